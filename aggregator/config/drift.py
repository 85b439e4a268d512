"""`[drift]`: how drift is judged."""

from dataclasses import dataclass

from edge_runtime.contract.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class DriftConfig:
    """How drift is judged; `aggregator.core.judge` gives the method.

    A look is taken when ``quorum`` of the active devices have sent ``horizon_rows`` rows and ``horizon_seconds`` of
    windows since the last look, or some have and ``patience_seconds`` have passed. The first ``baseline_looks`` at an
    artifact are the devices' own past, unless a known-good one is given.

    ``alpha`` is the probability that anything is alarmed falsely in ``budget_looks`` looks. An incident that rests on
    units compared with others opens after ``confirmations`` looks in a row, each at ``skew_alpha``. An incident closes
    after ``clear_confirmations`` looks with p above ``clear_p``. Real is not enough: PSI, or the largest difference of
    the distribution functions, or of the share of faulty values, must reach its floor; ``sensor_floor`` is that of a
    single device's distribution function. A fleet verdict needs ``min_devices``; below, devices are judged one by one.
    Up to ``few_share`` of the devices, and a quarter of that more, are a matter of sensors, not of the fleet.
    """

    attributes: tuple[str, ...] = ()
    alpha: float = 0.05
    budget_looks: int = 1000
    skew_alpha: float = 0.004
    confirmations: int = 2
    clear_p: float = 0.2
    clear_confirmations: int = 2
    baseline_looks: int = 8
    horizon_rows: int = 1000
    horizon_seconds: float = 0.0
    quorum: float = 0.8
    patience_seconds: float = 3600.0
    min_groups: int = 3
    min_devices: int = 10
    max_devices: int = 200
    few_share: float = 0.2
    exact_limit: int = 20_000
    samples: int = 4999
    enough: int = 50
    variance_floor: float = 1e-3
    psi_floor: float = 0.02
    cdf_floor: float = 0.05
    fault_floor: float = 0.01
    sensor_floor: float = 0.1
    prediction_floor: float = 0.1
    accuracy_floor: float = 0.05
    min_labelled: int = 50
    check_seconds: float = 5.0


def read_drift(f: Fields) -> DriftConfig:
    """The section; raises the reader's error family."""
    d = DriftConfig()
    config = DriftConfig(
        attributes=f.texts("attributes", d.attributes),
        alpha=f.number("alpha", d.alpha, low=1e-6, high=0.5),
        budget_looks=f.integer("budget_looks", d.budget_looks, low=1, high=100_000_000),
        skew_alpha=f.number("skew_alpha", d.skew_alpha, low=1e-6, high=0.5),
        confirmations=f.integer("confirmations", d.confirmations, low=1, high=100),
        clear_p=f.number("clear_p", d.clear_p, low=0.0, high=1.0),
        clear_confirmations=f.integer("clear_confirmations", d.clear_confirmations, low=1, high=100),
        baseline_looks=f.integer("baseline_looks", d.baseline_looks, low=2, high=1000),
        horizon_rows=f.integer("horizon_rows", d.horizon_rows, low=1),
        horizon_seconds=f.number("horizon_seconds", d.horizon_seconds, low=0.0),
        quorum=f.number("quorum", d.quorum, low=0.0, high=1.0),
        patience_seconds=f.number("patience_seconds", d.patience_seconds, low=0.0),
        min_groups=f.integer("min_groups", d.min_groups, low=2),
        min_devices=f.integer("min_devices", d.min_devices, low=3),
        max_devices=f.integer("max_devices", d.max_devices, low=2, high=10_000),
        few_share=f.number("few_share", d.few_share, low=0.0, high=0.5),
        exact_limit=f.integer("exact_limit", d.exact_limit, low=1, high=1_000_000),
        samples=f.integer("samples", d.samples, low=99, high=1_000_000),
        enough=f.integer("enough", d.enough, low=10, high=1_000_000),
        variance_floor=f.number("variance_floor", d.variance_floor, low=1e-12, high=1.0),
        psi_floor=f.number("psi_floor", d.psi_floor, low=0.0),
        cdf_floor=f.number("cdf_floor", d.cdf_floor, low=0.0, high=1.0),
        fault_floor=f.number("fault_floor", d.fault_floor, low=0.0, high=1.0),
        sensor_floor=f.number("sensor_floor", d.sensor_floor, low=0.0, high=1.0),
        prediction_floor=f.number("prediction_floor", d.prediction_floor, low=0.0, high=1.0),
        accuracy_floor=f.number("accuracy_floor", d.accuracy_floor, low=0.0, high=1.0),
        min_labelled=f.integer("min_labelled", d.min_labelled, low=1),
        check_seconds=f.number("check_seconds", d.check_seconds, low=0.01),
    )
    f.finish()
    if config.clear_p < max(config.alpha, config.skew_alpha):
        raise f.fail(
            "clear_p", f"{config.clear_p} is below alpha or skew_alpha: an incident could never stay open"
        )
    if config.max_devices < config.min_devices:
        raise f.fail("max_devices", f"{config.max_devices} is below min_devices {config.min_devices}")
    return config

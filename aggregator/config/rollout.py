"""`[rollout]`: stages and gates of a rollout; they stand in its request and in the ledger as well."""

from dataclasses import dataclass, field

from aggregator.records import Gates
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.release import ShadowGate, TrialGate

Stages = tuple[int | float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class RolloutConfig:
    """What a rollout does unless its request says otherwise.

    ``stages`` are counts of devices (whole numbers) or shares of the cohort (below 1); the last is 1.0,
    everyone.
    """

    stages: Stages = (1, 0.25, 1.0)
    gates: Gates = field(default_factory=Gates)
    trial: TrialGate = field(default_factory=TrialGate)
    shadow: ShadowGate = field(default_factory=lambda: ShadowGate(rows=100))
    tick_seconds: float = 1.0


def read_rollout(f: Fields) -> RolloutConfig:
    """The section; raises the reader's error family."""
    default = RolloutConfig()
    config = RolloutConfig(
        stages=read_stages(f, "stages", default.stages),
        gates=read_gates(f.section("gates", {}), default.gates),
        trial=read_trial(f.section("trial", {}), default.trial),
        shadow=read_shadow(f.section("shadow", {}), default.shadow),
        tick_seconds=f.number("tick_seconds", default.tick_seconds, low=0.01, high=3600.0),
    )
    f.finish()
    return config


def read_stages(f: Fields, name: str, default: Stages) -> Stages:
    """Stages: whole numbers from 1, or shares above 0, rising where they can be compared; the last is 1.0
    (everyone).
    """
    stages: list[int | float] = []
    for i, value in enumerate(f.items(name, list(default))):
        at = f"{name}[{i}]"
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise f.fail(at, f"{value!r} is neither a count (1, 2, …) nor a share (0.1, 1.0)")
        if (isinstance(value, int) and value < 1) or (isinstance(value, float) and not 0.0 < value <= 1.0):
            raise f.fail(at, f"{value!r}: a count is at least 1, a share above 0 and at most 1.0")
        before = [stage for stage in stages if type(stage) is type(value)]
        if before and value <= before[-1]:
            raise f.fail(at, f"{value!r} does not rise above the earlier stage {before[-1]!r}")
        stages.append(value)
    if not stages or stages[-1] != 1.0 or not isinstance(stages[-1], float):
        raise f.fail(name, "the last stage must be 1.0, everyone")
    return tuple(stages)


def read_gates(f: Fields, d: Gates) -> Gates:
    """Gates, with ``d`` where a key is absent; raises the reader's error family."""
    gates = Gates(
        committed_share=f.number("committed_share", d.committed_share, low=0.01, high=1.0),
        min_online_share=f.number("min_online_share", d.min_online_share, low=0.0, high=1.0),
        bake_seconds=f.number("bake_seconds", d.bake_seconds, low=0.0),
        timeout_seconds=f.number("timeout_seconds", d.timeout_seconds, low=0.1),
        max_failures=f.integer("max_failures", d.max_failures),
        min_rows=f.integer("min_rows", d.min_rows),
        max_bad_row_rate=f.number("max_bad_row_rate", d.max_bad_row_rate, low=0.0, high=1.0),
        max_latency_ratio=f.number("max_latency_ratio", d.max_latency_ratio, low=0.0),
        max_accuracy_drop=f.number("max_accuracy_drop", d.max_accuracy_drop, low=0.0, high=1.0),
        min_labelled=f.integer("min_labelled", d.min_labelled, low=1),
        design_effect=f.number("design_effect", d.design_effect, low=1.0),
        control_seconds=f.number("control_seconds", d.control_seconds, low=0.0),
    )
    f.finish()
    return gates


def read_trial(f: Fields, d: TrialGate) -> TrialGate:
    """The trial's gate on the device, with ``d`` where a key is absent; raises the reader's error family."""
    trial = TrialGate(
        predictions=f.integer("predictions", d.predictions),
        seconds=f.number("seconds", d.seconds, low=0.0),
        starts=f.integer("starts", d.starts, low=1, high=1000),
        max_refused=f.number("max_refused", d.max_refused, low=0.0, high=1.0),
    )
    f.finish()
    return trial


def read_shadow(f: Fields, d: ShadowGate) -> ShadowGate:
    """The shadow's gate on the device, with ``d`` where a key is absent; raises the reader's error family."""
    shadow = ShadowGate(
        rows=f.integer("rows", d.rows),
        max_disagreement=f.number("max_disagreement", d.max_disagreement, low=0.0, high=1.0),
    )
    f.finish()
    return shadow

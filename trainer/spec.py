"""What to train: one TOML file, read into frozen values. Unknown keys are refused with the nearest valid one.

docs/reference/training.md has every key; an example:

::

    name = "watch"            # the model family
    version = "1"
    seed = 0

    [data]
    source = "watch"          # the data set that ships with skiff, or the path of a .csv or .npz file
    people = [1, 2, 3]        # watch only: whose rows to train on
    wrists = [0]              # watch only: 0 left, 1 right, both by default
    # target = "label"        # files only: the column to predict
    # group = "device"        # files only: whose row it is; every group gets a reference profile of its own

    [evaluation]
    people = [7, 8, 9, 10]    # watch only: people nobody trains on
    # groups = ["device-9"]   # files only: groups to hold out,
    # fraction = 0.25         # or a share of the groups (of the rows where there are none)

    [model]
    kind = "forest"           # see `KINDS` for the kinds and their parameters
    scaler = "standard"       # standard, minmax, maxabs, robust or none
    trees = 60

    [budgets]                 # limits the model declares for every device; none by default
    predict_p99_us = 200.0
    rss_mb = 150.0

    [conversion]
    probes = 100000           # about how many rows to prove parity on
    # ranges = "training"     # where the model is proven and used; devices refuse other rows. Or feature by feature:
    ranges.accel_x_mean = { low = -20.0, high = 20.0 }   # both ends belong to it
    ranges.accel_x_std = { low = 0.0 }                   # no upper limit
"""

import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import ModelName
from edge_runtime.contract.manifest import Budgets

SCALERS: Final = ("standard", "minmax", "maxabs", "robust", "none")
WATCH: Final = "watch"
TRAINING: Final = "training"


@dataclass(frozen=True, slots=True)
class Parameter:
    """A number in ``[low, high]``; ``whole`` ones are integers."""

    low: float
    high: float
    whole: bool = True


_TREE: Final = {"max_depth": Parameter(1, 100), "min_samples_leaf": Parameter(1, 1_000_000)}
_FOREST: Final = {
    "trees": Parameter(1, 10_000),
    "max_samples": Parameter(1e-6, 1.0, whole=False),
    "max_features": Parameter(1e-6, 1.0, whole=False),
    **_TREE,
}
KINDS: Final[Mapping[str, Mapping[str, Parameter]]] = {
    "forest": _FOREST,
    "extra-trees": {name: p for name, p in _FOREST.items() if name != "max_samples"},
    "tree": _TREE,
    "logistic": {"C": Parameter(1e-12, 1e12, whole=False), "max_iter": Parameter(1, 1_000_000)},
    "forest-regressor": _FOREST,
    "ridge": {"alpha": Parameter(0.0, 1e12, whole=False)},
}
"""Kinds of estimator and their parameters; what is not given is scikit-learn's default."""
REGRESSORS: Final = ("forest-regressor", "ridge")


@dataclass(frozen=True, slots=True, kw_only=True)
class WatchSource:
    """Rows of the smart-watch data set; ``evaluation`` are people to evaluate on. None means all."""

    people: tuple[int, ...] | None
    wrists: tuple[int, ...] | None
    evaluation: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TableSource:
    """Rows of a file of the user's own; held out are ``groups`` where given, else a ``fraction``."""

    path: Path
    target: str
    group: str
    groups: tuple[str, ...]
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """The pipeline: a scaler, and an estimator of one of `KINDS` with its parameters."""

    kind: str
    scaler: str
    parameters: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredRanges:
    """Features and their lowest and highest value, None for no limit; ``where`` is the key of the file, for errors."""

    where: str
    features: tuple[tuple[str, tuple[float | None, float | None]], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainSpec:
    """Everything a training run is told. The same spec and rows give the same artifact, byte for byte."""

    name: ModelName
    version: str
    seed: int
    source: WatchSource | TableSource
    model: ModelSpec
    budgets: Budgets
    probes: int
    ranges: DeclaredRanges | Literal["training"] | None = None


def load(path: Path | str) -> TrainSpec:
    """Reads ``path``; raises `ConfigError` naming the file, the key and what is allowed."""
    path = Path(path)
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise ConfigError(f"{path}: cannot be read ({e.strerror}); pass the path of a training spec") from e
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
        raise ConfigError(f"{path}: not TOML ({e})") from e
    try:
        return read(document, str(path), path.parent)
    except ContractError as e:
        raise ConfigError(f"{path}: {e}") from e


def read(document: Mapping[str, object], where: str, folder: Path) -> TrainSpec:
    """Reads a document; paths in it are relative to ``folder``. Raises `ConfigError`, or `ContractError` for names."""
    f = Fields(document, where, ConfigError)
    data, evaluation = f.section("data"), f.section("evaluation", {})
    model, budgets, conversion = f.section("model"), f.section("budgets", {}), f.section("conversion", {})
    spec = TrainSpec(
        name=ids.model_name(f.text("name")),
        version=f.text("version", pattern=ids.VERSION),
        seed=f.integer("seed", 0, high=2**32 - 1),
        source=_source(data, evaluation, folder),
        model=_model(model),
        budgets=Budgets(
            predict_p99_ns=int(budgets.number("predict_p99_us", 0.0, low=0.0) * 1e3),
            rss_bytes=int(budgets.number("rss_mb", 0.0, low=0.0) * 1e6),
        ),
        probes=conversion.integer("probes", 100_000, low=1),
        ranges=_ranges(conversion),
    )
    for section in (data, evaluation, model, budgets, conversion, f):
        section.finish()
    return spec


def _source(data: Fields, evaluation: Fields, folder: Path) -> WatchSource | TableSource:
    source = data.text("source", max_length=4096)
    if source == WATCH:
        people, wrists = data.integers("people", ()), data.integers("wrists", ())
        held_out = evaluation.integers("people")
        both = sorted(set(people) & set(held_out))
        if both or not (people and held_out):
            raise evaluation.fail("people", f"{both or 'nobody'} cannot be both trained and evaluated on")
        return WatchSource(people=people, wrists=wrists or None, evaluation=held_out)
    path = (folder / Path(source).expanduser()).resolve()
    if path.suffix not in (".csv", ".npz"):
        raise data.fail("source", f"{source!r} is neither {WATCH!r} nor the path of a .csv or .npz file")
    group, groups = data.text("group", ""), evaluation.texts("groups", ())
    if groups and not group:
        raise evaluation.fail("groups", "data.group does not say which column names the groups")
    return TableSource(
        path=path,
        target=data.text("target"),
        group=group,
        groups=groups,
        fraction=0.0 if groups else evaluation.number("fraction", 0.25, low=0.01, high=0.9),
    )


def _model(f: Fields) -> ModelSpec:
    kind = f.text("kind", choices=tuple(KINDS))
    found: list[tuple[str, float]] = []
    given = f.names()
    for name, p in KINDS[kind].items():
        if name not in given:
            f.number(name, p.low)  # known, so that `finish` can suggest it
        elif p.whole:
            found.append((name, f.integer(name, low=int(p.low), high=int(p.high))))
        else:
            found.append((name, f.number(name, low=p.low, high=p.high)))
    return ModelSpec(
        kind=kind, scaler=f.text("scaler", "standard", choices=SCALERS), parameters=tuple(sorted(found))
    )


def _ranges(conversion: Fields) -> DeclaredRanges | Literal["training"] | None:
    try:
        features = conversion.section("ranges", {})
    except ConfigError as e:
        try:
            conversion.text("ranges", choices=(TRAINING,))
        except ConfigError:
            raise conversion.fail("ranges", f'expected "{TRAINING}", or a table of features') from e
        return TRAINING
    found = tuple((name, _ends(features.section(name))) for name in features.names())
    return DeclaredRanges(where=features.path, features=found) if found else None


def _ends(feature: Fields) -> tuple[float | None, float | None]:
    given = feature.names()
    found = {end: feature.number(end, 0.0) for end in ("low", "high")}
    feature.finish()
    low, high = (found[end] if end in given else None for end in ("low", "high"))
    if low is None and high is None:
        raise feature.fail("low", "is missing, and so is high; give one of them or both")
    if low is not None and high is not None and low > high:
        raise feature.fail("low", f"{low} is above high, {high}; swap them")
    return low, high

"""Each case: a model, converted; rows as Parquet; and what `skiff backtest` says of them."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import pandas as pd
from sklearn.ensemble import HistGradientBoostingClassifier, IsolationForest, RandomForestClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import Normalizer
from typer.testing import CliRunner

from benchmarks.real_data import tables
from cli.app import app
from converters import convert
from trainer.datasets import LEFT, RIGHT

Kind = Literal["nothing", "harmless", "harmful", "fault"]
"""What the rows hold: no change, one that costs the model nothing, one that does, or a fault that no model mends."""

Frames = Callable[[], pd.DataFrame]
PROBES: Final = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """``make`` gives an unfitted estimator; ``training`` its rows, ``label`` and ``group`` columns of these."""

    make: Callable[[], Any]
    training: Frames
    features: tuple[str, ...]
    label: str = ""
    group: str = ""
    ranges: Mapping[str, tuple[float | None, float | None]] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What is replayed. ``changed`` is the first window with changed rows, where there is one."""

    name: str
    what: str
    kind: Kind
    model: str
    rows: Frames
    device: str
    time: str
    window: str
    reference: Frames | None = None
    labels: str = ""
    changed: int | None = None


def _boosted() -> HistGradientBoostingClassifier:
    return HistGradientBoostingClassifier(max_depth=4, max_iter=60, random_state=0)


def _isolation() -> IsolationForest:
    return IsolationForest(n_estimators=50, random_state=0)


def _forest() -> RandomForestClassifier:
    return RandomForestClassifier(60, max_depth=8, min_samples_leaf=40, random_state=0)


def _digits() -> Any:
    return make_pipeline(Normalizer(), LogisticRegression(C=10, max_iter=2000))


def _watch_model(*wrists: int) -> Model:
    return Model(
        make=_forest,
        training=partial(tables.watch_training, wrists),
        features=tables.watch().feature_names,
        label="exercise",
        group="group",
    )


MODELS: Final[Mapping[str, Model]] = {
    "watch-left": _watch_model(LEFT),
    "watch-both": _watch_model(LEFT, RIGHT),
    "flights": Model(
        make=_boosted,
        training=tables.flights_first,
        features=tables.FLIGHT_FEATURES,
        label="left",
        group="AIRLINE",
    ),
    "weather-air": Model(
        make=_boosted,
        training=partial(tables.weather_weeks, 0),
        features=("temp", "dewp", "wind_speed"),
        label="air",
        group="origin",
    ),
    "weather-winter": Model(
        make=_boosted,
        training=partial(tables.weather_months, 1, 2),
        features=("temp", "humid", "wind_speed", "visib"),
        label="daytime",
        group="origin",
    ),
    "shift": Model(make=_isolation, training=partial(tables.shift_rows, 0, 120), features=("value",)),
    "stale": Model(
        make=_isolation, training=partial(tables.stale_rows, clean=True), features=("value_normalized",)
    ),
    "outliers": Model(
        make=_isolation,
        training=lambda: tables.outlier_rows().query("not outlier"),
        features=("value_normalized",),
        ranges={"value_normalized": (-0.05, 1.05)},
    ),
    "shuttle": Model(
        make=_boosted,
        training=tables.shuttle_first,
        features=tables.SHUTTLE_FEATURES,
        label="truth",
        group="unit",
    ),
    "digits": Model(
        make=_digits, training=tables.digits_training, features=tables.PIXELS, label="digit", group="group"
    ),
}

_WATCH: Final = partial(Case, device="watch", time="time", window="1h", labels="exercise")
_FLIGHTS: Final = partial(
    Case,
    kind="harmless",
    model="flights",
    rows=tables.flights_second,
    device="AIRLINE",
    time="DATE",
    labels="left",
    changed=0,
)
_WEATHER: Final = partial(Case, device="origin", time="time_hour", window="rows:168")
_PV: Final = partial(Case, time="timestamp")
_SHUTTLE: Final = partial(
    Case, model="shuttle", device="unit", time="time", window="rows:100", labels="truth"
)
_DIGITS: Final = partial(
    Case,
    model="digits",
    reference=tables.digits_known,
    device="camera",
    time="time",
    window="rows:10",
    labels="digit",
)
_WINTER: Final = partial(tables.weather_months, 1, 2)
_LATER: Final = partial(tables.weather_months, 3, 8)
_MOVED: Final = tables.HOURS // 2

CASES: Final[tuple[Case, ...]] = (
    _WATCH(
        name="watch-same",
        what="ten smart-watches, the same wrist",
        kind="nothing",
        model="watch-left",
        rows=tables.watch_same,
        reference=tables.watch_known,
    ),
    _WATCH(
        name="watch-moved",
        what="they move to the other wrist; the model knows one wrist",
        kind="harmful",
        model="watch-left",
        rows=tables.watch_moved,
        reference=tables.watch_known,
        changed=_MOVED,
    ),
    _WATCH(
        name="watch-moved-unlabelled",
        what="the same without labels",
        kind="harmful",
        model="watch-left",
        rows=tables.watch_moved,
        reference=tables.watch_known,
        labels="",
        changed=_MOVED,
    ),
    _WATCH(
        name="watch-moved-both",
        what="the same rows; the model knows both wrists",
        kind="harmless",
        model="watch-both",
        rows=tables.watch_moved,
        reference=tables.watch_known,
        changed=_MOVED,
    ),
    _WATCH(
        name="watch-joined",
        what="ten other watches join, on the other wrist; no history",
        kind="harmful",
        model="watch-left",
        rows=tables.watch_joined,
        changed=_MOVED,
    ),
    _WATCH(
        name="watch-joined-both",
        what="the same rows; the model knows both wrists",
        kind="harmless",
        model="watch-both",
        rows=tables.watch_joined,
        changed=_MOVED,
    ),
    _FLIGHTS(
        name="flights",
        what="13 airlines, second half of 2015 against the first",
        reference=tables.flights_first,
        window="rows:100",
    ),
    _FLIGHTS(name="flights-no-history", what="the same without history", window="rows:100"),
    _FLIGHTS(
        name="flights-days",
        what="the same by day, against the first half",
        reference=tables.flights_first,
        window="1d",
    ),
    _WEATHER(
        name="weather-weeks",
        what="three airports, odd weeks of 2013 against even ones",
        kind="nothing",
        model="weather-air",
        rows=partial(tables.weather_weeks, 1),
        reference=partial(tables.weather_weeks, 0),
        labels="air",
    ),
    _WEATHER(
        name="weather-seasons",
        what="March to August against winter; the model knows the year",
        kind="harmless",
        model="weather-air",
        rows=_LATER,
        reference=_WINTER,
        labels="air",
        changed=0,
    ),
    _WEATHER(
        name="weather-seasons-no-history",
        what="the same without history",
        kind="harmless",
        model="weather-air",
        rows=_LATER,
        labels="air",
        changed=0,
    ),
    _WEATHER(
        name="weather-winter-model",
        what="March to August against winter; the model knows winter",
        kind="harmful",
        model="weather-winter",
        rows=_LATER,
        reference=_WINTER,
        labels="daytime",
        changed=0,
    ),
    _PV(
        name="pv-shift",
        what="energy of one plant, the level shifts on day 300",
        kind="harmful",
        model="shift",
        rows=partial(tables.shift_rows, 120, 600),
        reference=partial(tables.shift_rows, 0, 120),
        device="plant",
        window="rows:10",
        changed=18,
    ),
    _PV(
        name="pv-stale",
        what="power of one inverter, three stretches stand still",
        kind="fault",
        model="stale",
        rows=partial(tables.stale_rows, clean=False),
        reference=partial(tables.stale_rows, clean=True),
        device="inverter",
        window="rows:20",
        changed=0,
    ),
    _PV(
        name="pv-outliers",
        what="power of one inverter, six outliers in 500 rows",
        kind="fault",
        model="outliers",
        rows=tables.outlier_rows,
        device="inverter",
        window="rows:20",
        changed=1,
    ),
    _SHUTTLE(
        name="shuttle", what="20 units, 7 % anomalies throughout", kind="nothing", rows=tables.shuttle_rest
    ),
    _SHUTTLE(
        name="shuttle-one-unit",
        what="one unit of 20 has nothing but anomalies",
        kind="fault",
        rows=tables.shuttle_one_unit,
        changed=9,
    ),
    _SHUTTLE(
        name="shuttle-storm",
        what="anomalies go from none to 29 % everywhere",
        kind="harmless",
        rows=tables.shuttle_storm,
        changed=9,
    ),
    _DIGITS(name="digits", what="ten cameras, nothing changes", kind="nothing", rows=tables.digits_later),
    _DIGITS(
        name="digits-dimmed",
        what="images dim to 60 %; the model looks at shape alone",
        kind="harmless",
        rows=partial(tables.digits_later, "dimmed"),
        changed=2,
    ),
    _DIGITS(
        name="digits-moved",
        what="images move by one pixel",
        kind="harmful",
        rows=partial(tables.digits_later, "moved"),
        changed=2,
    ),
)


class Workshop:
    """Converts models and replays cases in ``folder``, each model once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def model(self, name: str) -> Path:
        """The artifact of `MODELS`' ``name``."""
        path = self._folder / f"{name}.onnx"
        if not path.exists():
            given = MODELS[name]
            rows = given.training()
            inputs = rows[list(given.features)]
            y = rows[given.label].to_numpy() if given.label else None
            convert(
                given.make().fit(inputs, y),
                inputs,
                path,
                name=name,
                y=y,
                groups=rows[given.group].to_numpy() if given.group else None,
                probes=PROBES,
                ranges=given.ranges,
            )
        return path

    def arguments(self, case: Case) -> list[str]:
        """What to type after ``skiff``; the files that it names are there."""
        data = self._parquet(f"{case.name}.parquet", case.rows())
        found = ["backtest", str(self.model(case.model)), str(data), "--device-column", case.device]
        found += ["--time-column", case.time, "--window", case.window]
        if case.reference is not None:
            known = self._parquet(f"{case.name}-reference.parquet", case.reference())
            found += ["--reference", str(known)]
        return found + (["--labels", case.labels] if case.labels else [])

    def run(self, case: Case) -> dict[str, Any]:
        """The document that ``skiff backtest --json`` prints; raises `RuntimeError` with its words when it fails."""
        done = CliRunner().invoke(app, [*self.arguments(case), "--json"])
        if done.exit_code != 0:
            raise RuntimeError(f"{case.name}: exit code {done.exit_code}: {done.stderr}") from done.exception
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def _parquet(self, name: str, rows: pd.DataFrame) -> Path:
        path = self._folder / name
        rows.to_parquet(path, index=False)
        return path

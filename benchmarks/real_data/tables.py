"""The recorded rows, cut into what a model is trained on, known-good history, and what is replayed.

Files: ``data/README.md`` says where they are from. The watch data is the one that ships with skiff, the digits come
with scikit-learn.
"""

from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from sklearn.datasets import load_digits

from trainer.datasets import LEFT, RIGHT, WatchData, load_watch

DATA: Final = Path(__file__).parent / "data"
BEGIN: Final = pd.Timestamp("2026-03-02T00:00Z")
"""When rows begin that have no time of their own."""

PEOPLE: Final = tuple(range(1, 11))
TRAINING_PEOPLE: Final = PEOPLE[:6]
HOURS: Final = 12
"""Each watch recording is cut into so many parts, one for each hour: every hour has all seven exercises."""

FLIGHT_FEATURES: Final = ("TAXI_OUT", "AIR_TIME", "DISTANCE")
SECOND_HALF: Final = pd.Timestamp("2015-07-01")
LATE_MINUTES: Final = 15
WEATHER_FEATURES: Final = ("temp", "dewp", "humid", "wind_speed", "visib")
SHUTTLE_FEATURES: Final = tuple(f"f{k}" for k in range(1, 10))
UNITS: Final = 20
CALM_ROWS: Final = 18_000
PIXELS: Final = tuple(f"pixel_{row}_{column}" for row in range(8) for column in range(8))
CAMERAS: Final = 10


def _read(name: str, numbers: Sequence[str]) -> pd.DataFrame:
    """A file of `DATA`, ``numbers`` as float32."""
    return pd.read_parquet(DATA / name).astype(dict.fromkeys(numbers, "float32"))


# ── watch ──────────────────────────────────────────────────────────────────────────────────────────────


@cache
def watch() -> WatchData:
    """The smart-watch data set."""
    return load_watch()


def watch_training(wrists: tuple[int, ...]) -> pd.DataFrame:
    """Rows of six people on the given wrists; ``group`` is person and wrist."""
    found = watch().select(people=TRAINING_PEOPLE, wrists=wrists)
    return _watch_frame(found).assign(group=found.groups)


def _watch_frame(found: WatchData) -> pd.DataFrame:
    names = np.array(found.label_names)
    return pd.DataFrame(found.features, columns=list(found.feature_names)).assign(
        exercise=names[found.labels]
    )


def watch_hours(wrist: int, hours: range, *, at: int = 0, name: str = "person-{:02d}") -> pd.DataFrame:
    """Hours of ten watches on one wrist: part h of each of a person's seven recordings is in hour ``at`` + h."""
    parts = []
    for person in PEOPLE:
        recordings = watch().device_rows(person, wrist).recordings()
        for hour in hours:
            pieces = [
                _watch_frame(one.take(np.array_split(np.arange(len(one)), HOURS)[hour])) for one in recordings
            ]
            part = pd.concat(pieces, ignore_index=True)
            seconds = np.arange(len(part)) * (3600 / len(part))
            part["time"] = (
                BEGIN + pd.Timedelta(hours=at + hour) + pd.to_timedelta(seconds, unit="s").floor("ms")
            )
            part["watch"] = name.format(person)
            parts.append(part)
    return pd.concat(parts, ignore_index=True)


def watch_known() -> pd.DataFrame:
    """Six hours on the left wrist."""
    return watch_hours(LEFT, range(HOURS // 2))


def watch_same() -> pd.DataFrame:
    """The next six hours on the left wrist."""
    return watch_hours(LEFT, range(HOURS // 2, HOURS))


def watch_moved() -> pd.DataFrame:
    """Six hours on the left wrist, then twelve of the same watches on the right one."""
    return pd.concat([watch_same(), watch_hours(RIGHT, range(HOURS), at=HOURS)], ignore_index=True)


def watch_joined() -> pd.DataFrame:
    """Twelve hours of ten watches on the left wrist; from the seventh on ten others are there, on the right one."""
    left = watch_hours(LEFT, range(HOURS), name="left-{:02d}")
    right = watch_hours(RIGHT, range(HOURS // 2, HOURS), name="right-{:02d}")
    return pd.concat([left, right], ignore_index=True)


# ── flights ────────────────────────────────────────────────────────────────────────────────────────────


def _flights() -> pd.DataFrame:
    """Flights that left: without a departure there is no truth. Those diverted or called off later have gaps."""
    rows = _read("flights.parquet", (*FLIGHT_FEATURES, "DEPARTURE_DELAY")).dropna(subset=["DEPARTURE_DELAY"])
    rows["DATE"] = pd.to_datetime(rows["DATE"])
    return rows.assign(left=np.where(rows["DEPARTURE_DELAY"] >= LATE_MINUTES, "late", "on time"))


def flights_first() -> pd.DataFrame:
    """January to June 2015; ``left`` says whether the flight left late."""
    rows = _flights()
    return rows[rows["DATE"] < SECOND_HALF]


def flights_second() -> pd.DataFrame:
    """July to December 2015."""
    rows = _flights()
    return rows[rows["DATE"] >= SECOND_HALF]


# ── weather ────────────────────────────────────────────────────────────────────────────────────────────


def weather() -> pd.DataFrame:
    """2013 at three airports; ``daytime`` is from 7 to 19 o'clock there, ``air`` is damp above 60 % humidity."""
    rows = _read("weather.parquet", WEATHER_FEATURES).dropna(subset=list(WEATHER_FEATURES))
    hour = rows["time_hour"].dt.tz_convert("America/New_York").dt.hour
    return rows.assign(
        daytime=np.where((hour >= 7) & (hour < 19), "day", "night"),
        air=np.where(rows["humid"] > 60, "damp", "dry"),
        week=rows["time_hour"].dt.isocalendar().week.astype(int),
        month=rows["time_hour"].dt.month,
    )


def weather_weeks(odd: int) -> pd.DataFrame:
    """Every other week of the year."""
    rows = weather()
    return rows[rows["week"] % 2 == odd]


def weather_months(first: int, last: int) -> pd.DataFrame:
    """The months from ``first`` to ``last``."""
    rows = weather()
    return rows[rows["month"].between(first, last)]


# ── photovoltaics ──────────────────────────────────────────────────────────────────────────────────────


def shift_rows(first: int, last: int) -> pd.DataFrame:
    """Daily energy of one plant; from row 300 on it is another level (``label`` is 1 in that row)."""
    return _read("pv_shift.parquet", ("value",)).assign(plant="plant").iloc[first:last]


def stale_rows(*, clean: bool) -> pd.DataFrame:
    """Quarter hours with light of one inverter: the last two weeks, none of them stale, or the two before.

    ``stale_data_mask`` says which values stood still. Nights are left out: they are missing in the first weeks and
    zero in the last, and stand still with good reason.
    """
    rows = _read("pv_stale.parquet", ("value_normalized",)).assign(inverter="inverter")
    part = rows.iloc[1600:] if clean else rows.iloc[:1600]
    return part[part["value_normalized"] > 0]


def outlier_rows() -> pd.DataFrame:
    """Quarter hours of one inverter, six of which are marked in ``outlier``."""
    return _read("pv_outliers.parquet", ("value_normalized",)).assign(inverter="inverter")


# ── shuttle ────────────────────────────────────────────────────────────────────────────────────────────


def _shuttle() -> pd.DataFrame:
    rows = _read("shuttle.parquet", SHUTTLE_FEATURES)
    return rows.assign(truth=np.where(rows["anomaly"] == 1, "anomaly", "normal"))


def _in_turn(rows: pd.DataFrame) -> pd.DataFrame:
    """Rows dealt to `UNITS` units, one a minute each."""
    at = np.arange(len(rows))
    return rows.assign(
        unit=[f"unit-{k:02d}" for k in at % UNITS], time=BEGIN + pd.to_timedelta(at // UNITS * 60, unit="s")
    ).reset_index(drop=True)


def shuttle_first() -> pd.DataFrame:
    """The first 10,000 rows."""
    return _in_turn(_shuttle().iloc[:10_000])


def shuttle_rest() -> pd.DataFrame:
    """All other rows, in the file's order."""
    return _in_turn(_shuttle().iloc[10_000:])


def _rest_apart() -> tuple[pd.DataFrame, pd.DataFrame]:
    rest = _shuttle().iloc[10_000:]
    return rest[rest["anomaly"] == 0], rest[rest["anomaly"] == 1]


def shuttle_storm() -> pd.DataFrame:
    """18,000 normal rows, then 8,000 more with all anomalies among them."""
    normal, anomalies = _rest_apart()
    storm = pd.concat([normal.iloc[CALM_ROWS : CALM_ROWS + 8_000], anomalies]).sample(
        frac=1.0, random_state=0
    )
    return _in_turn(pd.concat([normal.iloc[:CALM_ROWS], storm]))


def shuttle_one_unit() -> pd.DataFrame:
    """Normal rows; after 18,000 of them ``unit-03`` has anomalies only."""
    normal, anomalies = _rest_apart()
    rows = _in_turn(normal.iloc[: CALM_ROWS + 12_000])
    its = np.flatnonzero((rows["unit"] == "unit-03") & (rows.index >= CALM_ROWS))[: len(anomalies)]
    for column in (*SHUTTLE_FEATURES, "anomaly", "truth"):
        rows.loc[its, column] = anomalies[column].to_numpy()[: len(its)]
    return rows


# ── digits ─────────────────────────────────────────────────────────────────────────────────────────────


def _digits(part: slice, change: str = "") -> pd.DataFrame:
    bunch = load_digits()
    rows = np.random.default_rng(0).permutation(len(bunch.target))[part]
    images: NDArray[Any] = bunch.images[rows].astype(np.float32)
    if change == "dimmed":
        images = images * np.float32(0.6)
    elif change == "moved":
        images = np.roll(images, 1, axis=2)
        images[:, :, 0] = 0.0
    return pd.DataFrame(images.reshape(len(rows), -1), columns=list(PIXELS)).assign(digit=bunch.target[rows])


def _cameras(rows: pd.DataFrame, minute: int = 0) -> pd.DataFrame:
    at = np.arange(len(rows))
    return rows.assign(
        camera=[f"camera-{k:02d}" for k in at % CAMERAS],
        time=BEGIN + pd.to_timedelta((minute + at // CAMERAS) * 60, unit="s"),
    )


def digits_training() -> pd.DataFrame:
    """500 images."""
    rows = _digits(slice(0, 500))
    return rows.assign(group=[f"camera-{k:02d}" for k in np.arange(len(rows)) % CAMERAS])


def digits_known() -> pd.DataFrame:
    """600 other images, of `CAMERAS` cameras in turn."""
    return _cameras(_digits(slice(500, 1100)))


def digits_later(change: str = "") -> pd.DataFrame:
    """200 more images, and 480 after a ``change``: none, ``dimmed`` to 60 %, or ``moved`` by one pixel to the right."""
    before = _cameras(_digits(slice(1100, 1300)))
    return pd.concat([before, _cameras(_digits(slice(1300, 1780), change), minute=60)], ignore_index=True)

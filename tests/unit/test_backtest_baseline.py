"""A reference that is no past of the data's devices is refused, and one that is a poor past is noted."""

from pathlib import Path

import numpy as np
import pytest

from aggregator.config import DriftConfig
from aggregator.core.components import components_of
from aggregator.core.past import Past
from cli.backtest.baseline import LEAST_WINDOWS, history_of
from cli.backtest.outcome import judge, learned
from cli.backtest.replay import EveryRows, replay
from cli.backtest.table import Table
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import DeviceId
from edge_runtime.engine import Engine
from tests.support.tiny_models import classifier

TINY = classifier()
SECOND = 1_000_000_000
START = 1_767_225_600 * SECOND
GOOD, DATA = Path("good.parquet"), Path("rows.parquet")
NEED = DriftConfig().baseline_looks


def replayed(counts, *, seed=0, start=0, refused=()):
    """Devices with so many windows of ten rows each, a row a second; those ``refused`` have a value missing."""
    rng = np.random.default_rng(seed)
    names = sorted(counts)
    rows = [10 * counts[name] for name in names]
    device = np.repeat(np.arange(len(names)), rows)
    values = rng.normal(size=(3, sum(rows))).astype(np.float32)
    values[0, np.isin(device, [names.index(name) for name in refused])] = np.nan
    times = np.concatenate([np.arange(n) for n in rows]) + start
    table = Table(
        devices=tuple(map(DeviceId, names)),
        device=device.astype(np.uint16),
        times_ns=START + times.astype(np.int64) * SECOND,
        values=values,
        refused={},
        truth=None,
        notes=(),
    )
    return replay(Engine(TINY.artifact), table, EveryRows(10))


def fleet(prefix, n, windows):
    return {f"{prefix}{k}": windows for k in range(n)}


def checked(past, now):
    return history_of(GOOD, past, DATA, now, NEED)


@pytest.mark.parametrize(
    ("past", "message"),
    [
        (replayed(fleet("pump-", 5, 3)), r"none of its devices \(pump-0, pump-1, pump-2 and 2 more\) is in rows.parq"),
        (replayed({"d0": 1, "d1": 1}), r"no device of rows.parquet has 2 windows in it .* \(the most, 1, d0\)"),
        (replayed(fleet("d", 2, 4), refused=("d0", "d1")), r"answers none of its rows \(missing 80\)"),
        (replayed({"d0": 4, "x": 4}, refused=("d0",)), r"no device .* \(the most, 0, d0\)"),
    ],
    ids=["others", "too short", "all refused", "refused where shared"],
)  # fmt: skip
def test_a_reference_that_is_no_past_is_refused(past, message):
    with pytest.raises(ConfigError, match=rf"^good\.parquet: .*{message}"):
        checked(past, replayed(fleet("d", 4, 12), start=10_000))


def test_as_many_windows_make_a_past_as_the_engine_needs():
    components = components_of(Engine(TINY.artifact).info)
    for windows in (LEAST_WINDOWS - 1, LEAST_WINDOWS):
        slices = replayed(fleet("d", 3, windows)).slices
        if windows < LEAST_WINDOWS:
            with pytest.raises(ValueError, match="two are needed"):
                Past(components, slices)
        else:
            assert Past(components, slices).devices == ("d0", "d1", "d2")


def test_devices_without_history_are_noted_and_get_their_own_first_windows():
    past = replayed({"d0": 4, "d1": 4, "d2": 1, "d3": 4}, refused=("d3",))
    history, (note,) = checked(past, replayed(fleet("d", 5, 12), start=10_000))
    assert note.startswith(
        "good.parquet: no history of 3 of 5 devices (d2, d3, d4): their first windows become it, and are not judged "
        f"(at least {NEED}, "
    )
    assert {reading.device for one in history for reading in one.readings} == {"d0", "d1"}


@pytest.mark.parametrize(
    ("start", "seed", "said"),
    [
        (-10_000, 1, None),
        (-120, 1, None),
        (0, 0, "has the same windows as rows.parquet"),
        (-60, 1, "overlaps rows.parquet in time for 3 of 3 devices (d0, d1, d2)"),
        (120, 1, "is later than rows.parquet for 3 of 3 devices (d0, d1, d2)"),
    ],
)
def test_a_reference_of_the_wrong_time_is_noted(start, seed, said):
    history, notes = checked(replayed(fleet("d", 3, 12), seed=seed, start=start), replayed(fleet("d", 3, 12)))
    assert len(history) == 12
    assert len(notes) == (said is not None)
    assert all(text.startswith(f"good.parquet: {said}") for text in notes)


@pytest.mark.parametrize(
    ("windows", "said"),
    [
        (NEED + 4, f"windows 0 to {NEED - 1} were learned as the devices' past; from {NEED} on windows were judged"),
        (NEED, f"windows 0 to {NEED - 1} were learned as the devices' past; there is none after them to be judged"),
        (NEED - 1, f"look {NEED - 1} of the {NEED} that make the devices' own past"),
    ],
)  # fmt: skip
def test_what_was_learned_instead_of_judged_is_said(windows, said):
    found = judge(Engine(TINY.artifact).info, (), replayed(fleet("d", 3, windows)).slices, DriftConfig())
    assert found.notes[0].startswith(said)
    assert found.learned == (0 if windows < NEED else NEED)


def test_windows_without_an_answered_row_teach_nothing():
    now = replayed({"d0": 9, "d1": 9}, refused=("d0", "d1"))
    assert learned(now.slices, NEED) == 0
    found = judge(Engine(TINY.artifact).info, (), now.slices, DriftConfig())
    assert found.notes == ("the model answers none of the rows: nothing was judged",)

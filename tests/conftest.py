"""Fixtures and profiles for the whole suite."""

import gc
import os
from collections import defaultdict
from collections.abc import Hashable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from tests.services import Mosquitto, find_mosquitto, missing_service
from tests.support.covering import covering

# Nothing above loads numpy: one BLAS thread each, or the workers of `-n` fight over the cores.
for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")
os.environ.setdefault("POLARS_MAX_THREADS", "1")
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before any test imports ONNX Runtime

# ci: the same examples every time, no wall-clock limits. full: five times as many of them, for `make test-all`.
# explore: fresh random examples, kept in .hypothesis.
settings.register_profile("ci", derandomize=True, max_examples=40, deadline=None, print_blob=True)
settings.register_profile("full", parent=settings.get_profile("ci"), max_examples=200)
settings.register_profile(
    "explore", max_examples=2_000, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


MEMORY = Path("/dev/shm")
ROOM_BYTES = 2_000_000_000


def pytest_configure() -> None:
    """Lets ``tmp_path`` be in memory where there is room: every commit of a store waits for a disk otherwise.

    Nothing less is proven: tests end processes, never the machine, and what was written outlives a process on both.
    """
    if not MEMORY.is_dir() or not os.access(MEMORY, os.W_OK):
        return
    found = os.statvfs(MEMORY)
    if found.f_bavail * found.f_frsize >= ROOM_BYTES and not found.f_flag & os.ST_NOEXEC:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks, before ``-m`` selects, every test that asks for a broker, and what the slow run is left by `covering` and
    ``sampled``.
    """
    matrices: defaultdict[str, list[pytest.Function]] = defaultdict(list)
    cases: defaultdict[str, int] = defaultdict(int)
    for item in items:
        if "mosquitto" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.broker)
        if isinstance(item, pytest.Function) and item.get_closest_marker("covering"):
            matrices[item.nodeid.partition("[")[0]].append(item)
        if sampled := item.get_closest_marker("sampled"):
            name = item.nodeid.partition("[")[0]
            if cases[name] % sampled.args[0]:
                item.add_marker(pytest.mark.slow)
            cases[name] += 1
    for matrix in matrices.values():
        kept = covering([_values(item) for item in matrix])
        for place, item in enumerate(matrix):
            if place not in kept:
                item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What imports and collection made stays until the end: no later garbage collection need walk it again."""
    gc.collect()
    gc.freeze()


def _values(item: pytest.Function) -> dict[str, Hashable]:
    """Which values the test got from each of its ``parametrize`` marks."""
    found: dict[str, Hashable] = {}
    for mark in item.iter_markers("parametrize"):
        names = mark.args[0].split(",") if isinstance(mark.args[0], str) else mark.args[0]
        found[",".join(names)] = tuple(id(item.callspec.params[name.strip()]) for name in names)
    return found


@pytest.fixture(autouse=True)
def same_numbers_each_time() -> None:
    """Estimators without a ``random_state`` draw from numpy's global generator: let it begin anew for each test."""
    import numpy as np  # noqa: PLC0415 (not before the thread counts above are set)

    np.random.seed(0)  # noqa: NPY002


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture
def mosquitto(tmp_path: Path) -> Iterator[Mosquitto]:
    """A running Mosquitto of this test's own, with persistence, on a free loopback port."""
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    folder = tmp_path / "mosquitto"
    folder.mkdir()
    broker = Mosquitto(binary, folder)
    broker.start()
    try:
        yield broker
    finally:
        broker.close()

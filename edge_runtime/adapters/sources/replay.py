"""Recorded rows as a source."""

import random
import threading
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.adapters.sources.ndjson import Answerer, Request
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Label

CATCH_UP_SECONDS: Final = 1.0
"""A source that fell further behind than this (a suspended machine) goes on from now instead of hurrying after."""
BURST_SECONDS: Final = 0.02
"""Waking up costs more than most predictions: rows due within this come together."""


class ReplaySource:
    """Recorded rows, over and over: whole recordings in a new random order each round, rows in order of time.

    ``path`` is an ``.npz`` with ``features`` (n, F) of numbers, and optionally ``labels`` (n,) in the pipeline's own
    label type and ``recording`` (n,) integers; rows of one recording stand together. The same ``seed`` gives the same
    order. All rows are held in memory.

    Raises:
        ConfigError: the file is missing or is not such a file.
    """

    def __init__(
        self,
        path: Path,
        *,
        rows_per_second: float,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        if rows_per_second <= 0:
            raise ConfigError(
                f"{path}: cannot be replayed at {rows_per_second} rows a second; more than 0 is needed"
            )
        self._features, self._labels, recording = _load(path)
        self._period = 1.0 / rows_per_second
        self._random = random.Random(seed)  # noqa: S311 (an order of replay, no secret)
        self._clock = clock
        cuts = np.flatnonzero(np.diff(recording)) + 1
        self._recordings = [
            range(part[0], part[-1] + 1) for part in np.split(np.arange(len(recording)), cuts)
        ]

    def serve(self, answer: Answerer, stop: threading.Event) -> None:
        """Hands each row on when it is due, until ``stop`` is set; nobody reads the answers."""
        for row, truth in self.rows(stop):
            answer(Request(rows=row, truth=truth))

    def rows(self, stop: threading.Event) -> Iterator[tuple[NDArray[np.float32], Label | None]]:
        """Each row (F,) float32, read-only, with its label if there is one, until ``stop`` is set.

        A row comes when it is due, or at most `BURST_SECONDS` early: a fast replay wakes up for several rows at once.
        """
        due = self._clock()
        while True:
            for recording in self._random.sample(self._recordings, len(self._recordings)):
                for i in recording:
                    now = self._clock()
                    due = now if now - due > CATCH_UP_SECONDS else due
                    ahead = due - now
                    if stop.wait(ahead) if ahead > BURST_SECONDS else stop.is_set():
                        return
                    due += self._period
                    yield self._features[i], None if self._labels is None else self._labels[i]


def _load(path: Path) -> tuple[NDArray[np.float32], list[Label] | None, NDArray[np.int64]]:
    try:
        # Opened here, because np.load leaves a file open that it cannot read.
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            features = archive["features"].astype(np.float32)
            labels = archive.get("labels")
            recording = archive.get("recording", np.zeros(len(features)))
    except KeyError as e:
        raise ConfigError(f"{path}: {e.args[0]}; a replay needs an array 'features'") from e
    except (OSError, EOFError, RuntimeError, TypeError, ValueError, zipfile.BadZipFile, zlib.error) as e:
        raise ConfigError(f"{path}: not a readable .npz file of numbers ({e})") from e
    if features.ndim != 2 or not len(features):
        raise ConfigError(
            f"{path}: features have shape {features.shape}; (n, F) with at least one row is needed"
        )
    for name, column in (("labels", labels), ("recording", recording)):
        if column is not None and column.shape != (len(features),):
            raise ConfigError(f"{path}: {name} has shape {column.shape}, but there are {len(features)} rows")
    features.setflags(write=False)
    return features, None if labels is None else labels.tolist(), recording.astype(np.int64)

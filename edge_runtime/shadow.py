"""``python -m edge_runtime.shadow``: a candidate answers rows that the model in service has answered; nobody hears it.

A process of its own: a candidate that crashes, hangs or grows does it here, and its Python never holds the lock of the
interpreter that serves. One JSON job on stdin; packets of rows on a socket that it inherits; counts as JSON lines on
stdout, one for each packet, which is all that is ever told of the rows. It sleeps between two batches for as long as
its share of the CPU asks for. It ends when the other end of the socket is closed.

Both models answer each row here: what the serving one answered before is not carried along, so that models of any
outputs are compared in one way. What goes wrong while the serving one loads or answers is not held against the
candidate, nor is the end of a process that was not at work on the candidate (see `marker`).
"""

import json
import os
import resource
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.adapters import sandbox
from edge_runtime.adapters.child import end_with_reader, give_way
from edge_runtime.adapters.marker import Marker
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError, SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.manifest import Feature
from edge_runtime.engine import Engine, Rows
from edge_runtime.schema import Schema
from edge_runtime.serving import check_same_stream

BATCH_ROWS: Final = 256
LEAST_PAUSE_SECONDS: Final = 0.02
"""Each batch leaves the caches cold for a few rows of the model in service. With batches of 16 rows, and no pause but
for the share of the CPU, that was more than one row in a hundred: the 99th percentile rose by 40 %."""
MAX_PACKET_BYTES: Final = 1 << 20
MAX_REASON: Final = 1000
LOWEST_PRIORITY: Final = 19
CELLS_APART: Final = 2
"""Predictions of regressors in neighbouring cells agree: the border between them may run anywhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowJob:
    """Who is compared with whom, at what price.

    Rows are the ``incumbent``'s, packed, and come in on ``rows_fd``; ``marker_fd`` is the `Marker` of the candidate's
    turn. ``address_space_bytes`` are for each of the two models, ``run_limit_seconds`` of CPU time for each row of the
    candidate; 0 for no limit.
    """

    incumbent: Path
    incumbent_digest: ids.Digest
    candidate: Path
    candidate_digest: ids.Digest
    rows_fd: int
    marker_fd: int
    cpu_share: float
    address_space_bytes: int
    run_limit_seconds: float

    @classmethod
    def read(cls, document: object) -> "ShadowJob":
        """Reads the job; raises `ContractError`."""
        f = Fields(document, "shadow")
        return cls(
            incumbent=Path(f.text("incumbent", max_length=4096)),
            incumbent_digest=ids.digest(f.text("incumbent_digest")),
            candidate=Path(f.text("candidate", max_length=4096)),
            candidate_digest=ids.digest(f.text("candidate_digest")),
            rows_fd=f.integer("rows_fd", low=3),
            marker_fd=f.integer("marker_fd", low=3),
            cpu_share=f.number("cpu_share", low=0.001, high=1.0),
            address_space_bytes=f.integer("address_space_bytes", low=1),
            run_limit_seconds=f.number("run_limit_seconds", low=0.0),
        )


class Incomparable(SkiffError):
    """The model in service cannot be loaded, or does not answer, in this process: nobody is compared with it."""


@contextmanager
def _incumbents_turn() -> Iterator[None]:
    """Nothing that goes wrong in here is the candidate's fault."""
    try:
        yield
    except SkiffError as e:
        raise Incomparable(f"the model in service: {e}") from e
    except MemoryError as e:
        raise Incomparable("the model in service does not fit into the address space of the shadow") from e


class Comparison:
    """Two models that read the same stream; raises `ArtifactError` when they do not.

    *Disagreement* of a row: another label in any of the outputs; without labels, a prediction that lies `CELLS_APART`
    cells or more from the incumbent's in the incumbent's own layout; an answer where the other has none; or a row that
    the candidate would have refused. Rows with a category that the incumbent did not know are not compared: which it
    was is not known any more.
    """

    def __init__(
        self,
        incumbent: Engine,
        candidate: Engine,
        *,
        candidates_turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        check_same_stream(incumbent, candidate)
        self._candidates_turn: Final = candidates_turn
        self._incumbent: Final = incumbent
        self._candidate: Final = candidate
        before, after = incumbent.info.manifest, candidate.info.manifest
        self._schema: Final = Schema(after.features, after.input_dtype)
        self._codes: Final = {
            j: _codes(old, new)
            for j, (old, new) in enumerate(zip(before.features, after.features, strict=True))
            if old.kind == "category"
        }
        self._strict: Final = [j for j in self._codes if not after.features[j].unseen]
        self._labels: Final = [
            np.array([_place(label, new) for label in old])
            for old, new in zip(before.outputs, after.outputs, strict=True)
        ]
        self._edges: Final = np.asarray(incumbent.info.reference.spec.score.edges, np.float32)

    def count(self, rows: Rows) -> tuple[int, int]:
        """How many of ``rows`` (n, F), packed for the incumbent, were compared, and how many disagree.

        Raises:
            ArtifactError: the candidate's graph failed on them.
            BudgetExceeded: it took too long, or too much memory.
            Incomparable: the incumbent's did, whatever it was.
        """
        rows = rows[self._known(rows)]
        if not len(rows):
            return 0, 0
        translated = self._translated(rows)
        refused: NDArray[np.bool_] = (translated[:, self._strict] == -1.0).any(axis=1)
        for mask in self._schema.refused(translated).values():
            refused |= mask
        asked = ~refused
        disagreed = int(refused.sum())
        if asked.any():
            with _incumbents_turn():
                was = self._incumbent.run(rows[asked])
            with self._candidates_turn():
                found = self._candidate.run(translated[asked])
            disagreed += int(self._differ(was, found).sum())
        return len(rows), disagreed

    def _known(self, rows: Rows) -> NDArray[np.bool_]:
        known = np.ones(len(rows), np.bool_)
        for j in self._codes:
            known &= rows[:, j] != -1.0
        return known

    def _translated(self, rows: Rows) -> Rows:
        with np.errstate(over="ignore"):
            found: Rows = rows.astype(self._candidate.dtype)
        for j, codes in self._codes.items():
            there = ~np.isnan(rows[:, j])
            found[there, j] = codes[rows[there, j].astype(np.int64)]
        return found

    def _differ(self, before: tuple[Any, Rows], after: tuple[Any, Rows]) -> NDArray[np.bool_]:
        (labels, scores), (new_labels, new_scores) = before, after
        differ: NDArray[np.bool_] = np.isnan(scores).any(axis=1) != np.isnan(new_scores).any(axis=1)
        if labels is None or new_labels is None:
            was, now = (self._edges.searchsorted(values) for values in (scores, new_scores))
            differ |= (np.abs(was - now) >= CELLS_APART).any(axis=1)
            return differ
        old, new = (values.reshape(len(scores), -1) for values in (labels, new_labels))
        for k, places in enumerate(self._labels):
            differ |= places[old[:, k]] != new[:, k]
        return differ


def _codes(old: Feature, new: Feature) -> NDArray[np.float64]:
    """The candidate's code of each of the incumbent's; -1 for what it does not know."""
    return np.array([_place(value, new.vocabulary) for value in old.vocabulary], np.float64)


def _place(label: object, labels: tuple[Any, ...]) -> int:
    """Where ``label`` is in ``labels``, of the same type, too; -1 when it is not there."""
    return next((i for i, other in enumerate(labels) if type(other) is type(label) and other == label), -1)


def work(job: ShadowJob, rows: socket.socket, marker: Marker) -> None:
    """Compares what comes in on ``rows`` until its other end is closed.

    Raises `Incomparable` when something is wrong with the incumbent, another `SkiffError` or `MemoryError` when it is
    the candidate that is no good.
    """
    with _incumbents_turn():
        incumbent = Engine(job.incumbent, expect=job.incumbent_digest)
    with marker.within():
        candidate = Engine(
            job.candidate,
            expect=job.candidate_digest,
            # A process of the lowest priority waits for the CPU longer than it runs. Here a run has many rows.
            run_limit_seconds=job.run_limit_seconds * BATCH_ROWS,
            run_clock_ns=time.process_time_ns,
        )
    comparison = Comparison(incumbent, candidate, candidates_turn=marker.within)
    _say({"ready": True})
    dtype, width = incumbent.dtype, incumbent.features
    while packet := rows.recv(MAX_PACKET_BYTES):
        table = np.frombuffer(packet, dtype).reshape(-1, width)
        counts = np.zeros(2, np.int64)
        for start in range(0, len(table), BATCH_ROWS):
            before = time.process_time()
            counts += comparison.count(table[start : start + BATCH_ROWS])
            spent = time.process_time() - before
            time.sleep(max(LEAST_PAUSE_SECONDS, spent * (1.0 / job.cpu_share - 1.0)))
        _say({"rows": int(counts[0]), "disagreed": int(counts[1])})


def _say(line: Mapping[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def _step_back() -> None:
    try:
        os.nice(LOWEST_PRIORITY)
    except OSError as e:  # a service may not be allowed to; there is still the share of the CPU
        sys.stderr.write(f"the priority cannot be lowered: {e}\n")


def main() -> int:
    """Entry point: 0 when the socket was closed, or with a line that says what is wrong; 2 when the job is none."""
    end_with_reader()
    give_way()
    _step_back()
    try:
        job = ShadowJob.read(json.load(sys.stdin))
    except (ValueError, ContractError) as e:
        sys.stderr.write(f"shadow: not a job ({e})\n")
        return 2
    sandbox.limit(resource.RLIMIT_AS, 2 * job.address_space_bytes)
    try:
        with socket.socket(fileno=job.rows_fd) as rows:
            work(job, rows, Marker(job.marker_fd))
    except Incomparable as e:
        _say({"incomparable": str(e)[:MAX_REASON]})
    except SkiffError as e:
        _say({"failed": str(e)[:MAX_REASON]})
    except MemoryError:
        _say({"failed": f"does not fit into {job.address_space_bytes / 1e6:.0f} MB of address space"})
    return 0


if __name__ == "__main__":
    sys.exit(main())

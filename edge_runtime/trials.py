"""A candidate on trial as the daemon sees it: beside whom it is measured, and what it has done."""

import logging
from collections.abc import Callable
from typing import Final

from edge_runtime.beside import Incumbent, TrialStats
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded
from edge_runtime.contract.ids import Digest
from edge_runtime.core import events as core
from edge_runtime.engine import Engine
from edge_runtime.runtime import Runtime

log = logging.getLogger("skiffd")


class Trials:
    """Not thread-safe. ``load`` makes an engine of a model, ``rss_bytes`` reads the resident memory.

    CPU times are taken during a trial only, and the incumbent is kept in memory that long, unless the process is above
    ``most_rss_bytes`` with it (0: no limit), which is not the candidate's fault.
    """

    def __init__(
        self, *, load: Callable[[Digest], Engine], rss_bytes: Callable[[], int], most_rss_bytes: int
    ) -> None:
        self._load: Final = load
        self._rss_bytes: Final = rss_bytes
        self._most_rss_bytes: Final = most_rss_bytes
        self._before: TrialStats | None = None
        self._since = 0.0
        self._to_load: Digest | None = None

    def begin(
        self,
        runtime: Runtime,
        tried: Digest | None,
        now_seconds: float,
        *,
        before: Engine | None,
        committed: Digest | None,
        crashed: bool = False,
    ) -> None:
        """A model was put into ``runtime``: ``tried``, or none on trial. ``before`` is the engine that it replaced.

        After a start there is none: the incumbent is loaded when the candidate answers already, but not where the
        process before ``crashed``, for the memory of both may be what it died of.
        """
        self._before, self._since, self._to_load = None, now_seconds, None
        runtime.measure_cpu, runtime.incumbent = tried is not None, None
        if tried is None or committed is None:
            return
        if before is not None and before.digest == committed:
            runtime.incumbent = Incumbent(before)
        elif not crashed:
            self._to_load = committed

    def report(self, runtime: Runtime, tried: Digest | None, now_seconds: float) -> core.Served | None:
        """What the model on trial did since the last call; None while none is."""
        if tried is None:
            runtime.measure_cpu, runtime.incumbent, self._to_load = False, None, None
            return None
        if self._to_load is not None:
            committed, self._to_load = self._to_load, None
            runtime.incumbent = self._incumbent(committed)
        stats, before, since = runtime.trial_stats(), self._before, self._since
        self._before = stats
        predictions = stats.predictions - (before.predictions if before else 0)
        if predictions:  # the time until a row is answered is the trial's, too
            self._since = now_seconds
        return core.Served(
            digest=runtime.digest,
            predictions=predictions,
            failed=stats.failed - (before.failed if before else 0),
            refused=stats.refused_alone - (before.refused_alone if before else 0),
            seconds=now_seconds - since,
            cpu=stats.cpu,
            incumbent_cpu=stats.incumbent_cpu,
            rss_bytes=self._rss_of(runtime),
            declared_p99_ns=runtime.engine.info.manifest.budgets.predict_p99_ns,
        )

    def _rss_of(self, runtime: Runtime) -> int:
        found = self._rss_bytes()
        if runtime.incumbent is None or not 0 < self._most_rss_bytes < found:
            return found
        runtime.let_incumbent_go()
        return self._rss_bytes()

    def _incumbent(self, committed: Digest) -> Incumbent | None:
        try:
            return Incumbent(self._load(committed))
        except (ArtifactError, BudgetExceeded) as e:
            log.warning("not_compared committed=%s reason=%s", committed, e)
            return None

"""The update child as the daemon sees it: a job out, events back. Its memory is never the daemon's."""

import logging
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final

from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ContractError
from edge_runtime.core import events as core

GRACE_SECONDS: Final = 10.0
"""The child keeps its own deadline; what is still there this long after it is killed."""

if TYPE_CHECKING:
    from edge_runtime.adapters.child import Child

log = logging.getLogger("skiffd")


class Updates:
    """At most one update child at a time. Not thread-safe.

    ``wake`` is called when it has spoken, ``killed`` when it was ended by a signal.
    """

    def __init__(self, config: DaemonConfig, *, wake: Callable[[], None], killed: Callable[[], None]) -> None:
        self._config = config
        self._wake = wake
        self._killed = killed
        self._child: Child | None = None
        self._answered = False
        self._over = False

    @property
    def running(self) -> bool:
        """Whether a child is at work."""
        return self._child is not None

    def start(self, action: core.StartUpdate) -> None:
        """Sets a new child to work on a release; not after `kill`."""
        if self._over:
            return
        from edge_runtime.adapters.child import Child  # noqa: PLC0415 (most of the time nobody needs it in memory)

        deadline_seconds = self._config.update_deadline_seconds
        self._child = Child(
            "edge_runtime.updater",
            _job(self._config, action),
            wake=self._wake,
            deadline_seconds=deadline_seconds + GRACE_SECONDS,
        )
        self._answered = False

    def kill(self) -> None:
        """Ends the child at once, if there is one; it was the last."""
        self._over = True
        if self._child is not None:
            self._child.kill()

    def listen(self) -> Iterator[core.AgentEvent]:
        """What the child has said since the last call; a child that ended without a result failed."""
        while self._child is not None and (line := self._child.poll()) is not None:
            try:
                if "progress" in line:
                    phase = core.update_phase(line)
                    log.info("update_progress phase=%s digest=%s", phase.phase, phase.digest)
                    yield phase
                elif "result" in line:
                    ended = core.update_ended(line["result"])
                    self._answered = True
                    if not ended.ok:
                        log.warning("update_failed stage=%s reason=%s", ended.stage, ended.reason)
                    yield ended
                elif "exit" in line:
                    self._child = None
                    if line["exit"] < 0:
                        self._killed()
                    if not self._answered:
                        reason = f"the update child ended with {line['exit']}: {line['stderr'][-300:]}"
                        log.warning("update_died reason=%s", reason)
                        yield core.UpdateEnded(ok=False, stage="child", reason=reason, retry=True)
            except ContractError as e:
                log.warning("update_misspoke reason=%s", e)


def _job(c: DaemonConfig, action: core.StartUpdate) -> dict[str, Any]:
    """What the child is told on its stdin; see `edge_runtime.update_job`."""
    tls = {"ca": c.fetch.ca, "certificate": c.broker.certificate, "key": c.broker.key}
    return {
        "state_dir": str(c.state_dir),
        "fleet": c.fleet,
        "cohort": c.cohort,
        "model": c.model,
        "device": c.device,
        "broker": {name: getattr(c.broker, name) for name in c.broker.__dataclass_fields__},
        "web": {"url": c.fetch.url, **tls} if c.fetch.url else {},
        "prefer": c.fetch.prefer,
        "max_chunk_bytes": c.fetch.max_chunk_bytes,
        "release": action.release.hex(),
        "root": str(c.trust_root),
        "floor": action.floor,
        "serving": action.serving or "",
        "have": list(action.have),
        "quarantine": dict(action.quarantine),
        "budgets": {"predict_p99_ns": c.budget.predict_p99_ns, "rss_bytes": c.budget.rss_bytes},
        "load_peak_bytes": c.costs.load_peak_bytes,
        "probe_address_space_bytes": c.probe_address_space_bytes,
        "deadline_seconds": c.update_deadline_seconds,
    }

"""``skiffd CONFIG.toml``: the device's composition root. It joins the agent, the data plane and the adapters.

Two threads: the *feed* takes rows from the source and predicts; the main thread owns everything else and performs
what the agent decides. The link's thread and the child's reader only enqueue and wake it.
"""

import argparse
import json
import logging
import random
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from edge_runtime import __version__
from edge_runtime.adapters.child import Child
from edge_runtime.adapters.outbox import Outbox
from edge_runtime.adapters.probes import Probes
from edge_runtime.adapters.slots import Slots
from edge_runtime.adapters.sources import ReplaySource
from edge_runtime.config import DaemonConfig, load
from edge_runtime.contract.errors import (
    ArtifactError,
    BudgetExceeded,
    ConfigError,
    ContractError,
    LinkError,
    SkiffError,
)
from edge_runtime.contract.ids import Digest, session_id
from edge_runtime.contract.topics import WINDOW
from edge_runtime.core import events as core
from edge_runtime.core import lifecycle
from edge_runtime.core.agent import Agent, Identity
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.windowing import OpenWindow, is_due, open_window
from edge_runtime.engine import Engine
from edge_runtime.link import Connected, Disconnected, Link, Outgoing, Received
from edge_runtime.runtime import Observation, Runtime

TICK_SECONDS: Final = 0.25
EXIT_FAILED: Final = 1
EXIT_CONFIG: Final = 2

log = logging.getLogger("skiffd")


class Feed(threading.Thread):
    """Takes rows from the source and predicts them, until told to stop.

    Rows wait while there is no model. A bad row is counted by the runtime and does not end the feed.
    """

    def __init__(self, source: ReplaySource, stop: threading.Event) -> None:
        super().__init__(name="feed", daemon=True)
        self._source = source
        self._stop_event = stop
        self._ready = threading.Event()
        self._runtime: Runtime | None = None

    def attach(self, runtime: Runtime | None) -> None:
        """The runtime that answers from now on; None lets rows wait."""
        self._runtime = runtime
        if runtime is None:
            self._ready.clear()
        else:
            self._ready.set()

    def run(self) -> None:
        """The thread's body."""
        for row, truth in self._source.rows(self._stop_event):
            while not self._ready.wait(TICK_SECONDS):
                if self._stop_event.is_set():
                    return
            runtime = self._runtime
            if runtime is None:
                continue
            try:
                prediction = runtime.predict(row)
            except SkiffError as e:
                log.debug("row_refused reason=%s", e)
                continue
            if truth is not None:
                runtime.record_truth(1, int(prediction.label == truth))


class Daemon:
    """One device: state on disk, a link to the broker, a model that serves, and an update child now and then."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        config.state_dir.mkdir(parents=True, exist_ok=True)
        self._rng = random.Random()  # noqa: S311 (jitter and a session's name, no secret)
        self._slots = Slots(config.state_dir)
        self._outbox = Outbox(config.state_dir / "outbox.db", max_bytes=config.outbox_bytes)
        self._probes = Probes()
        identity = Identity(
            fleet=config.fleet,
            device=config.device,
            cohort=config.cohort,
            session=session_id(f"{self._rng.getrandbits(64):016x}"),
            model=config.model,
            attributes=config.attributes,
        )
        self._agent = Agent(identity, self._load_slots(), config.budget, self._rng)
        death = self._agent.death()
        self._link = Link(
            config.broker,
            client_id=config.device,
            will=Outgoing(death.topic, death.payload, death.delivery),
            delay=lambda attempt: next_delay_seconds(attempt, self._rng),
        )
        self._stop = threading.Event()
        self._runtime: Runtime | None = None
        self._feed: Feed | None = None
        if config.source.kind == "replay":
            source = ReplaySource(
                config.source.path,
                rows_per_second=config.source.rows_per_second,
                seed=config.source.seed,
            )
            self._feed = Feed(source, self._stop)
        self._child: Child | None = None
        self._window: OpenWindow | None = None
        self._events: deque[core.AgentEvent] = deque()
        self._handling = False
        self._sampled = (0, 0, 0.0)

    def _load_slots(self) -> lifecycle.SlotState:
        self._saved = self._slots.record()
        if self._saved is None:
            return lifecycle.SlotState(model=self._config.model)
        return lifecycle.from_document(self._saved, self._config.model)

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────

    def run(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set, then closes the window, keeps it, and says goodbye."""
        for topic in self._agent.subscriptions:
            self._link.subscribe(topic)
        self._handle(core.Started())
        if self._feed is not None:
            self._feed.start()
        self._link.start()
        next_tick = time.monotonic()
        try:
            while not stop.is_set():
                event = self._link.poll(max(0.0, min(TICK_SECONDS, next_tick - time.monotonic())))
                match event:
                    case Connected():
                        log.info("connected")
                        self._handle(core.Connected())
                    case Disconnected():
                        log.info("disconnected reason=%s", event.reason)
                        self._handle(core.Disconnected())
                    case Received():
                        self._handle(core.MessageArrived(event.topic, event.payload))
                    case _:
                        pass
                self._listen_to_child()
                if time.monotonic() >= next_tick:
                    next_tick = time.monotonic() + TICK_SECONDS
                    self._tick()
        finally:
            self._shut_down()

    def _tick(self) -> None:
        self._report_trial()
        runtime, window = self._runtime, self._window
        if runtime is not None and window is not None:
            rows, mono_ns = runtime.rows, time.monotonic_ns()
            if is_due(self._config.window, window, rows=rows, mono_ns=mono_ns):
                self._close_window(runtime.take_window(), window)
                self._window = self._open_window()
        self._handle(core.Ticked())

    def _handle(self, event: core.AgentEvent) -> None:
        self._events.append(event)
        if self._handling:  # raised while an action is performed: the actions after it come first
            return
        self._handling = True
        try:
            while self._events:
                for action in self._agent.handle(self._events.popleft(), time.monotonic(), time.time_ns()):
                    self._perform(action)
        finally:
            self._handling = False

    def _shut_down(self) -> None:
        self._stop.set()
        if self._feed is not None and self._feed.is_alive():
            self._feed.join(timeout=5.0)
        if self._child is not None:
            self._child.kill()
        if self._runtime is not None and self._window is not None:
            self._close_window(self._runtime.take_window(), self._window)
            self._handle(core.Ticked())
        if self._link.connected:
            self._perform(self._agent.death())
        self._link.stop(timeout=2.0)
        self._outbox.close()
        log.info("stopped")

    # ── performing ─────────────────────────────────────────────────────────────────────────────────────

    def _perform(self, action: core.Action) -> None:
        match action:
            case core.Save():
                self._save(action.slots)
            case core.Serve():
                self._serve(action.digest)
            case core.Collect():
                self._slots.collect(action.keep)
            case core.Publish():
                self._publish(action)
            case core.Append():
                self._append(action)
            case core.Send():
                self._send(action)
            case core.Trim():
                self._outbox.trim(action.session, action.seqs)
            case core.StartUpdate():
                self._start_update(action)

    def _publish(self, action: core.Publish) -> None:
        try:
            self._link.publish(Outgoing(action.topic, action.payload, action.delivery))
        except LinkError as e:
            log.info("publish_lost topic=%s reason=%s", action.topic, e)

    def _save(self, state: lifecycle.SlotState) -> None:
        document = lifecycle.to_document(state)
        if document == self._saved:
            return
        try:
            self._slots.write_record(document)
        except OSError as e:
            # To go on would mean to act on a state that a restart forgets; what was saved before is still whole.
            raise SkiffError(
                f"{self._config.state_dir}: the state cannot be saved ({e.strerror}): free some space; "
                "started again, this device serves the model it had committed"
            ) from e
        self._saved = document

    def _append(self, action: core.Append) -> None:
        try:
            self._outbox.append(action.session, action.seq, action.topic, action.payload)
        except SkiffError as e:
            log.error("record_lost seq=%d topic=%s reason=%s", action.seq, action.topic, e)  # noqa: TRY400 (no trace)
            return
        kept = (action.session, action.seq, action.topic, len(self._outbox))
        log.info("record_kept session=%s seq=%d topic=%s waiting=%d", *kept)

    def _send(self, action: core.Send) -> None:
        sent = []
        for record in self._outbox.pending(action.room, action.skip):
            try:
                self._link.publish(Outgoing(record.topic, record.payload, WINDOW))
            except LinkError as e:
                log.info("send_interrupted reason=%s", e)
                break
            sent.append((session_id(record.session), record.seq))
        if sent:
            self._events.append(core.Sent(tuple(sent)))

    def _serve(self, digest: Digest | None) -> None:
        if digest is None:
            self._runtime = None
            if self._feed is not None:
                self._feed.attach(None)
            return
        before = self._runtime.engine if self._runtime is not None else None
        try:
            engine = Engine(self._slots.blob(digest), threads=self._config.threads, expect=digest)
            old = self._runtime.swap(engine) if self._runtime is not None else None
        except (ArtifactError, BudgetExceeded) as e:
            log.warning("model_broken digest=%s reason=%s", digest, e)
            self._events.append(core.ServeFailed(digest, str(e)))
            return
        if self._runtime is None:
            self._runtime = Runtime(engine)
        if old is not None and self._window is not None:
            self._close_window(old, self._window)
        self._runtime.incumbent = before if before is not None and before.digest != digest else None
        self._measure(self._runtime)
        self._sampled = (0, 0, time.monotonic())
        self._window = self._open_window()
        if self._feed is not None:
            self._feed.attach(self._runtime)
        log.info("serving digest=%s", digest)

    def _open_window(self) -> OpenWindow:
        return open_window(
            self._config.window,
            wall_ns=time.time_ns(),
            mono_ns=time.monotonic_ns(),
            synced=self._config.clock_synced,
        )

    def _close_window(self, seen: Observation, window: OpenWindow) -> None:
        if seen.rows < self._config.window.min_rows:
            if seen.rows:
                log.info("window_withheld rows=%d min_rows=%d", seen.rows, self._config.window.min_rows)
            return
        log.info("window_closed rows=%d digest=%s", seen.rows, seen.digest)
        self._handle(
            core.WindowClosed(
                digest=seen.digest,
                start_ns=window.start_wall_ns,
                end_ns=time.time_ns(),
                synced=self._config.clock_synced,
                profile=seen.profile,
                latency=seen.latency,
                health=self._probes.health(),
                refused=seen.refused,
                failed=seen.failed,
                labelled=seen.labelled,
                correct=seen.correct,
            )
        )

    def _report_trial(self) -> None:
        runtime = self._runtime
        if runtime is None or not self._on_trial():
            return
        stats = runtime.trial_stats()
        predictions, failed, since = self._sampled
        now = time.monotonic()
        self._sampled = (stats.predictions, stats.failed, now)
        self._handle(
            core.Served(
                digest=runtime.digest,
                predictions=stats.predictions - predictions,
                failed=stats.failed - failed,
                seconds=now - since,
                cpu=stats.cpu,
                incumbent_cpu=stats.incumbent_cpu,
                rss_bytes=self._probes.health().rss_bytes,
            )
        )
        self._measure(runtime)

    def _measure(self, runtime: Runtime) -> None:
        """CPU times are taken during a trial only, and the incumbent is kept in memory that long."""
        runtime.measure_cpu = self._on_trial()
        if not runtime.measure_cpu:
            runtime.incumbent = None

    def _on_trial(self) -> bool:
        return self._agent.slots.trial is not None

    # ── the update child ───────────────────────────────────────────────────────────────────────────────

    def _start_update(self, action: core.StartUpdate) -> None:
        c = self._config
        job: dict[str, Any] = {
            "state_dir": str(c.state_dir),
            "fleet": c.fleet,
            "cohort": c.cohort,
            "model": c.model,
            "device": c.device,
            "broker": {name: getattr(c.broker, name) for name in c.broker.__dataclass_fields__},
            "release": action.release.hex(),
            "root": str(c.trust_root),
            "floor": action.floor,
            "serving": action.serving or "",
            "have": list(action.have),
            "quarantine": dict(action.quarantine),
            "budgets": {"predict_p99_ns": c.budget.predict_p99_ns, "rss_bytes": c.budget.rss_bytes},
            "probe_address_space_bytes": c.probe_address_space_bytes,
            "deadline_seconds": c.update_deadline_seconds,
        }
        self._child = Child(
            "edge_runtime.updater",
            job,
            wake=self._link.wake,
            deadline_seconds=c.update_deadline_seconds + 10.0,
        )
        self._child_answered = False

    def _listen_to_child(self) -> None:
        while self._child is not None and (line := self._child.poll()) is not None:
            try:
                if "progress" in line:
                    phase = core.update_phase(line)
                    log.info("update_progress phase=%s digest=%s", phase.phase, phase.digest)
                    self._handle(phase)
                elif "result" in line:
                    ended = core.update_ended(line["result"])
                    self._child_answered = True
                    if not ended.ok:
                        log.warning("update_failed stage=%s reason=%s", ended.stage, ended.reason)
                    self._handle(ended)
                elif "exit" in line:
                    self._child = None
                    if not self._child_answered:
                        reason = f"the update child ended with {line['exit']}: {line['stderr'][-300:]}"
                        log.warning("update_died reason=%s", reason)
                        self._handle(core.UpdateEnded(ok=False, stage="child", reason=reason, retry=True))
            except ContractError as e:
                log.warning("update_misspoke reason=%s", e)


class JsonLines(logging.Formatter):
    """One JSON object a line, with the device bound."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self._device = device

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON text."""
        event, _, rest = record.getMessage().partition(" ")
        line = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.created)),
            "level": record.levelname.lower(),
            "device": self._device,
            "event": event,
        }
        if rest:
            line["detail"] = rest
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of ``skiffd``; exits 0 after a clean stop, 1 when it cannot go on, 2 on a bad configuration."""
    parser = argparse.ArgumentParser(
        prog="skiffd", description="Serve, watch and update one model on this device."
    )
    parser.add_argument("config", type=Path, help="TOML file; see device_configs/ for examples")
    parser.add_argument(
        "--check", action="store_true", help="read the configuration, say what it means, and exit"
    )
    parser.add_argument("--version", action="version", version=f"skiffd {__version__}")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config)
    except ConfigError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return EXIT_CONFIG
    if arguments.check:
        sys.stdout.write(f"ok: device {config.device} of fleet {config.fleet} serves model {config.model}\n")
        return 0
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(config.device))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    try:
        daemon = Daemon(config)
    except SkiffError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return EXIT_CONFIG
    try:
        daemon.run(stop)
    except SkiffError as e:
        log.critical("gave_up reason=%s", e)
        return EXIT_FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The device's composition root: it joins the agent, the data plane and the adapters.

The main thread owns everything and performs what the agent decides. The *feed* takes rows from the source and predicts;
the link's thread, the child's readers and the status socket's thread only enqueue, wake, or read.
"""

import logging
import os
import random
import threading
import time
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from edge_runtime import __version__, feed
from edge_runtime.adapters import clock, disk
from edge_runtime.adapters.last_exit import FIRST_START
from edge_runtime.adapters.slots import Slots
from edge_runtime.adapters.systemd import Notifier
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, ConfigError, LinkError, SkiffError
from edge_runtime.contract.ids import Digest, session_id
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.topics import WINDOW
from edge_runtime.core import events as core
from edge_runtime.core import lifecycle
from edge_runtime.core.agent import Agent
from edge_runtime.core.backoff import Every, next_delay_seconds
from edge_runtime.core.probation import SAVE_SECONDS
from edge_runtime.core.voice import Identity
from edge_runtime.core.windowing import OpenWindow, close_window, is_due, open_window, publish_delay_ns
from edge_runtime.engine import Engine
from edge_runtime.keeper import Keeper
from edge_runtime.loading import load_model
from edge_runtime.runtime import Observation, Runtime
from edge_runtime.trials import Trials
from edge_runtime.updates import Updates
from edge_runtime.watch import Watch

if TYPE_CHECKING:
    from edge_runtime.adapters.status_socket import StatusSocket
    from edge_runtime.shadowing import Shadowing
    from edge_runtime.uplink import Uplink

TICK_SECONDS: Final = 0.25
WATCH_SECONDS: Final = 1.0
CLOCK_SECONDS: Final = 60.0
GOODBYE_SECONDS: Final = 2.0
GOLDEN_SECONDS: Final = 60.0
"""How often the serving model is asked a golden row where no watchdog says so."""

log = logging.getLogger("skiffd")


class Daemon:
    """One device: state on disk, a link to the broker, a model that serves, and an update child now and then."""

    def __init__(self, config: DaemonConfig) -> None:
        self._config = config
        _make_folder(config.state_dir)
        self._rng = random.Random()  # noqa: S311 (jitter and a session's name, no secret)
        self._watch = Watch(config)
        self._slots = Slots(config.state_dir)
        self._identity = Identity(
            fleet=config.fleet,
            device=config.device,
            cohort=config.cohort,
            session=session_id(f"{self._rng.getrandbits(64):016x}"),
            model=config.model,
            attributes=config.attributes,
            last_exit=self._watch.last_exit,
            restarts=self._watch.restarts,
        )
        self._keeper = Keeper(config)
        self._saved = self._slots.record()
        self._unsaved = False
        self._agent = Agent(
            self._identity, self._on_disk(), config.budget, self._rng, shadows=config.shadow_cpu_share > 0
        )
        self._link: Uplink | None = None
        self._updates = Updates(config, wake=self._wake, killed=self._watch.note)
        self._shadowing: Shadowing | None = None
        self._trials = Trials(
            load=self._load, rss_bytes=self._watch.rss_bytes, most_rss_bytes=config.budget.rss_bytes
        )
        self._stop = threading.Event()
        self._feed = feed.make(config.source, self._stop, client_id=f"{config.device}-rows")
        self._notifier = Notifier(os.environ)
        self._status: StatusSocket | None = None
        self._runtime: Runtime | None = None
        self._window: OpenWindow | None = None
        # The model that should serve gave golden rows wrong answers, freshly loaded too.
        self._disproved = False
        self._hold_until_ns = 0
        self._synced = self._read_clock()
        self._events: deque[core.AgentEvent] = deque()
        self._handling = False
        self._looks = Every(WATCH_SECONDS)
        self._clock_looks = Every(CLOCK_SECONDS)
        self._save_tries = Every(SAVE_SECONDS)
        self._golden_runs = Every(self._notifier.watchdog_seconds or GOLDEN_SECONDS)

    def _on_disk(self) -> lifecycle.SlotState:
        if self._saved is None:
            return lifecycle.SlotState(model=self._config.model)
        return lifecycle.from_document(self._saved, self._config.model)

    # ── the loop ───────────────────────────────────────────────────────────────────────────────────────

    def run(self, stop: threading.Event) -> None:
        """Serves until ``stop`` is set or the source has ended, then keeps the open window and says goodbye.

        Raises `SkiffError` when the source broke, or memory stays above its hard limit whatever is done.
        """
        self._watch.begin(self._identity.session)
        self._handle(core.ClockChanged(self._synced))
        if self._feed is not None:
            self._feed.start()  # it answers as soon as a model serves, while what follows waits for the disk
        failure: BaseException | None = None
        try:
            self._handle(core.Started(crashed=self._watch.crashed))
            link = self._reach_out()
            self._notifier.ready()
            self._loop(stop, link)
        except BaseException as e:
            failure = e
            raise
        finally:
            self._shut_down()
            self._watch.end(failure)

    def _reach_out(self) -> "Uplink":
        """Opens the ways to the broker and to ``skiffd --status``."""
        # Loaded here because rows can be answered by now: above, it would delay the first answer by a fifth.
        from edge_runtime.adapters.status_socket import StatusSocket  # noqa: PLC0415
        from edge_runtime.uplink import Uplink  # noqa: PLC0415

        self._link = link = Uplink(
            self._config.broker,
            client_id=self._config.device,
            will=self._agent.death(),
            topics=self._agent.subscriptions,
            delay=lambda attempt: next_delay_seconds(attempt, self._rng),
        )
        self._status = StatusSocket(self._config.status_socket, lambda: self._document(link))
        try:
            self._status.start()
        except LinkError as e:
            log.warning("status_unavailable reason=%s", e)
        return link

    def _loop(self, stop: threading.Event, link: "Uplink") -> None:
        next_tick = time.monotonic()
        while not stop.is_set() and not self._is_over():
            happened = link.poll(max(0.0, min(TICK_SECONDS, next_tick - time.monotonic())))
            if happened is not None:
                self._handle(happened)
            for told in self._updates.listen():
                self._handle(told)
            if self._shadowing is not None:
                for told in self._shadowing.listen():
                    self._handle(told)
            if time.monotonic() >= next_tick:
                next_tick = time.monotonic() + TICK_SECONDS
                self._tick(time.monotonic())

    def _wake(self) -> None:
        if self._link is not None:
            self._link.wake()

    def _is_over(self) -> bool:
        if self._watch.tired:
            raise SkiffError(f"{self._watch.tired}: started again, the memory is free")
        if self._feed is None or not self._feed.done.is_set():
            return False
        if self._feed.failure is not None:
            raise SkiffError(f"the source of rows broke: {self._feed.failure}") from self._feed.failure
        log.info("source_ended")
        return True

    def _tick(self, now_seconds: float) -> None:
        runtime, window = self._runtime, self._window
        if runtime is not None and (served := self._trials.report(runtime, self._agent.tried, now_seconds)):
            self._handle(served)
            runtime, window = self._runtime, self._window
        if runtime is not None and window is not None:
            times = {"wall_ns": time.time_ns(), "mono_ns": _boot_ns()}
            rows = runtime.rows
            if not rows and runtime.unanswered:  # nobody's row can be read from no rows at all
                rows = self._config.window.min_rows
            if is_due(self._config.window, window, rows=rows, **times):
                self._end_window(runtime, window)
                self._window = self._open_window()
        if self._looks.due(now_seconds):
            if self._runtime is not None and self._agent.slots.shadowing is not None:
                self._runtime.count()  # what is counted is what the shadow sees
            committed = self._agent.slots.committed
            for told in self._watch.tick(self._runtime, self._agent.tried if committed else None):
                self._handle(told)
            for told in self._keeper.tick(now_seconds):
                self._handle(told)
        if self._clock_looks.due(now_seconds) and (synced := self._read_clock()) != self._synced:
            log.info("clock_changed synced=%s", synced)
            self._synced = synced
            self._handle(core.ClockChanged(synced))
        if self._unsaved and self._save_tries.due(now_seconds):
            self._save(core.Save(self._agent.slots, needed=False))
        if self._golden_runs.due(now_seconds):
            self._prove_alive()
        self._handle(core.Ticked())

    def _prove_alive(self) -> None:
        """The watchdog is fed only by a model that gives a golden row its answer, or while there is none to give it.

        A model that does not is taken out of service before it answers another row, and loaded anew from its file:
        memory may have gone wrong. Only a fresh one that fails as well has failed for the agent.
        """
        if self._runtime is not None and (problem := self._runtime.engine.golden_problem()):
            digest = self._runtime.digest
            log.error("golden_row_failed digest=%s problem=%s", digest, problem)
            self._serve(None)
            self._serve(digest)
            self._handle(core.Noticed("golden_row_failed", (("digest", digest), ("reason", problem))))
            self._disproved = self._runtime is None
        if not self._disproved:
            self._notifier.alive()

    def _handle(self, event: core.AgentEvent) -> None:
        self._events.append(event)
        if self._handling:  # raised while an action is performed: the actions after it come first
            return
        self._handling = True
        try:
            while self._events:
                for action in self._agent.handle(self._events.popleft(), time.monotonic(), time.time_ns()):
                    if not self._perform(action):
                        break
        finally:
            self._handling = False

    def _shut_down(self) -> None:
        self._notifier.stopping()
        self._stop.set()
        if self._feed is not None and self._feed.is_alive():
            self._feed.join(timeout=5.0)
        self._updates.kill()
        if self._shadowing is not None:
            self._shadowing.stop()
        if self._status is not None:
            self._status.stop()
        if self._runtime is not None and self._window is not None:
            self._hold_until_ns = 0
            self._end_window(self._runtime, self._window)
            self._handle(core.Ticked())
        if self._link is not None:
            self._link.close(self._agent.death(), timeout_seconds=GOODBYE_SECONDS)
        self._keeper.close()
        self._notifier.close()
        log.info("stopped")

    # ── performing ─────────────────────────────────────────────────────────────────────────────────────

    def _perform(self, action: core.Action) -> bool:
        """Performs one action; False when those after it must not be performed."""
        match action:
            case core.Save():
                return self._save(action)
            case core.Serve():
                self._serve(action.digest)
            case core.Shadow():
                self._shadow(action.digest)
            case core.Collect():
                self._collect(action.keep)
            case core.Publish():
                if self._link is not None:  # without one the agent knows of no connection
                    self._link.publish(action)
            case core.Append():
                self._keeper.append(action)
            case core.Send():
                self._send(action)
            case core.Trim():
                self._keeper.trim(action)
            case core.StartUpdate():
                self._updates.start(action)
        return True

    def _save(self, action: core.Save) -> bool:
        document = lifecycle.to_document(action.slots)
        try:
            if document != self._saved:
                self._slots.write_record(document)
                if document["quarantine"] != (self._saved or {}).get("quarantine", []):
                    self._slots.write_record(document)  # a worn newest copy must not forget who was condemned
        except OSError as e:
            self._unsaved = True
            problem = f"{self._config.state_dir}: the state cannot be saved ({e.strerror}): free some space"
            log.error("state_unsaved needed=%s reason=%s", action.needed, problem)  # noqa: TRY400 (no trace)
            if action.needed:
                self._events.appendleft(
                    core.Unsaved(problem)
                )  # nothing else is decided on what did not happen
            return not action.needed
        self._saved, self._unsaved = document, False
        if action.needed:
            self._events.appendleft(core.Saved())
        return True

    def _collect(self, keep: tuple[Digest, ...]) -> None:
        try:
            self._slots.collect((*keep, *self._on_disk().known))
        except OSError as e:
            log.warning("not_collected reason=%s", e)

    def _send(self, action: core.Send) -> None:
        link = self._link
        if link is None or not link.connected or _boot_ns() < self._hold_until_ns:
            return
        sent = []
        for record in self._keeper.about_to_leave(action):
            try:
                link.hand_over(record.topic, record.payload, WINDOW)
            except BudgetExceeded as e:
                self._keeper.discard(record, str(e))
                continue
            except LinkError as e:
                log.info("send_interrupted reason=%s", e)
                break
            sent.append((session_id(record.session), record.seq))
        if sent:
            self._events.append(core.Sent(tuple(sent)))

    def _load(self, digest: Digest) -> Engine:
        """What a trial was compared with is in memory, and needs no disk to serve again."""
        kept = self._runtime.incumbent if self._runtime is not None else None
        if kept is not None and kept.engine.digest == digest and not kept.engine.golden_problem():
            return kept.engine
        on_trial = digest == self._agent.tried
        return load_model(self._slots.blob(digest), digest, self._config, on_trial=on_trial)

    def _serve(self, digest: Digest | None) -> None:
        if digest is None:
            self._serve_none()
            return
        before = self._runtime.engine if self._runtime is not None else None
        try:
            engine = self._load(digest)
            old = self._runtime.swap(engine) if self._runtime is not None else None
        except (ArtifactError, BudgetExceeded) as e:
            log.warning("model_broken digest=%s reason=%s", digest, e)
            if self._runtime is not None and self._runtime.digest in dict(self._agent.slots.quarantine):
                self._serve_none()
            self._events.append(core.ServeFailed(digest, str(e)))
            return
        if self._runtime is None:
            self._runtime = Runtime(engine)
        self._watch.hold(self._runtime)
        if old is not None and self._window is not None:
            self._close_window(old, self._window)
        tried, committed = self._agent.tried, self._agent.slots.committed
        crashed = self._watch.crashed
        self._trials.begin(
            self._runtime, tried, time.monotonic(), before=before, committed=committed, crashed=crashed
        )
        self._window = self._open_window()
        self._disproved = False
        if self._feed is not None:
            self._feed.attach(self._runtime)
        log.info("serving digest=%s", digest)
        self._shadow(self._shadowing.candidate if self._shadowing is not None else None)

    def _serve_none(self) -> None:
        """Rows wait for a model; what the last one saw is kept."""
        if self._feed is not None:
            self._feed.attach(None)
        if self._runtime is not None and self._window is not None:
            self._end_window(self._runtime, self._window)
        self._runtime, self._window, self._disproved = None, None, False
        self._shadow(self._shadowing.candidate if self._shadowing is not None else None)

    def _shadow(self, candidate: Digest | None) -> None:
        """Has ``candidate`` compared with the model in service, whichever that is now."""
        if self._stop.is_set():
            return
        if self._shadowing is None:
            if candidate is None:
                return
            from edge_runtime.shadowing import Shadowing  # noqa: PLC0415 (most of the time nobody needs it in memory)

            self._shadowing = Shadowing(self._config, self._slots, wake=self._wake)
        runtime = self._runtime
        self._shadowing.follow(candidate, runtime.digest if runtime is not None else None)
        if runtime is not None:
            runtime.tap = self._shadowing.offer if candidate is not None else None

    # ── windows ────────────────────────────────────────────────────────────────────────────────────────

    def _read_clock(self) -> bool:
        if self._config.clock == "auto":
            return bool(clock.is_synced())  # where nobody knows, the clock is not trusted
        return self._config.clock == "synced"

    def _open_window(self) -> OpenWindow:
        return open_window(
            self._config.window, wall_ns=time.time_ns(), mono_ns=_boot_ns(), synced=self._synced
        )

    def _end_window(self, runtime: Runtime, window: OpenWindow) -> None:
        if self._feed is not None:
            self._feed.flush()
        self._close_window(runtime.take_window(), window)

    def _close_window(self, seen: Observation, window: OpenWindow) -> None:
        self._watch.count(seen)
        silent = not seen.rows and not seen.failed and not seen.refused
        if silent or 0 < seen.rows < self._config.window.min_rows:
            if seen.rows:
                log.info("window_withheld rows=%d min_rows=%d", seen.rows, self._config.window.min_rows)
            return
        log.info("window_closed rows=%d digest=%s", seen.rows, seen.digest)
        mono_ns = _boot_ns()
        span = close_window(window, wall_ns=time.time_ns(), mono_ns=mono_ns, synced=self._synced)
        if not self._stop.is_set():
            self._hold_until_ns = mono_ns + publish_delay_ns(self._config.window, self._config.device)
        self._handle(
            core.WindowClosed(
                digest=seen.digest,
                start_ns=span.start_ns,
                end_ns=span.end_ns,
                synced=span.synced,
                profile=seen.profile,
                latency=seen.latency,
                queueing=seen.queueing,
                health=self._watch.health(),
                refused=seen.refused,
                failed=seen.failed,
                labelled=seen.labelled,
                correct=seen.correct,
            )
        )

    # ── what `skiffd --status` prints ──────────────────────────────────────────────────────────────────

    def _document(self, link: "Uplink") -> dict[str, Any]:
        """Made by the status socket's thread: it only reads."""
        from edge_runtime.adapters import status_report  # noqa: PLC0415 (the uplink has loaded it)

        me, runtime, window = self._identity, self._runtime, self._window
        latency, queueing = runtime.timings() if runtime is not None else (LatencyHistogram(),) * 2
        report = status_report.DeviceReport(
            version=__version__,
            fleet=me.fleet,
            device=me.device,
            cohort=me.cohort,
            session=me.session,
            wall_ns=time.time_ns(),
            clock="synced" if self._synced else "unsynced",
            models=(self._agent.report,),
            rows=self._watch.rows,
            latency=latency,
            queueing=queueing,
            window_age_seconds=(_boot_ns() - window.start_mono_ns) / 1e9 if window is not None else 0.0,
            health=self._watch.newest,
            limits=self._watch.limits,
            outbox=self._keeper.report,
            link=link.report,
            last_exit=me.last_exit or FIRST_START,
            restarts=me.restarts,
            starts=self._watch.starts,
        )
        return status_report.to_document(report)


def _boot_ns() -> int:
    """Monotonic time that goes on while the machine sleeps."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


def _make_folder(path: Path) -> None:
    try:
        disk.make_folder(path)
    except OSError as e:
        raise ConfigError(f"device.state_dir: {path} cannot be made ({e.strerror})") from e

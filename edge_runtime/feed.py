"""The feed: a thread that joins where rows come from and the runtime that answers them."""

import logging
import math
import random
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, Final

import numpy as np

from edge_runtime.adapters.sources import Source
from edge_runtime.adapters.sources.ndjson import Answer, Refusal, Reply, Request
from edge_runtime.config import SourceConfig
from edge_runtime.contract.errors import ArtifactError, BudgetExceeded, ConfigError, InputError
from edge_runtime.contract.manifest import Label, Manifest
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.runtime import Prediction, Runtime

PATIENCE_SECONDS: Final = 5.0
TICK_SECONDS: Final = 0.25
WAITS_AT_ONCE: Final = 256
"""Times are handed to the runtime in bulk: one at a time costs more than a small model's prediction."""

log = logging.getLogger("skiffd")


class Feed(threading.Thread):
    """Answers the rows of one source, until it has no more or ``stop`` is set.

    Without a model a row waits for one, but no longer than ``patience_seconds`` after the model was lost (or the feed
    was made), and is then refused as ``unavailable``. Every reply is counted. A bad row never ends the feed.

    Attributes:
        done: set when the feed has ended, whatever the reason; the daemon may then end too.
        failure: what broke the source, or None; to be looked at when ``done`` is set.
        answered: requests answered with a prediction.
        refused: requests refused, by reason, including those that never reached the runtime. Read it from any thread.
    """

    def __init__(
        self,
        source: Source,
        stop: threading.Event,
        *,
        patience_seconds: float = PATIENCE_SECONDS,
        clock_ns: Callable[[], int] = time.perf_counter_ns,
    ) -> None:
        super().__init__(name="feed", daemon=True)
        self.done: Final = threading.Event()
        self.failure: Exception | None = None
        self.answered = 0
        self.refused: dict[str, int] = {}
        self._source = source
        self._stop_event = stop
        self._patience_seconds = patience_seconds
        self._clock_ns = clock_ns
        self._ready = threading.Event()
        self._runtime: Runtime | None = None
        self._waits_until = time.monotonic() + patience_seconds
        self._waits: list[int] = []
        self._waits_lock = threading.Lock()

    def attach(self, runtime: Runtime | None) -> None:
        """The runtime that answers from now on; None lets rows wait."""
        if runtime is None:
            self.flush()
            if self._runtime is not None:
                self._waits_until = time.monotonic() + self._patience_seconds
            self._ready.clear()
        self._runtime = runtime
        if runtime is not None:
            self._ready.set()

    def run(self) -> None:
        """The thread's body."""
        try:
            self._source.serve(self.answer, self._stop_event)
        except Exception as e:
            self.failure = e
            log.exception("feed_broken")
        finally:
            self.flush()
            log.info("feed_ended answered=%d refused=%s", self.answered, self.refused)
            self.done.set()

    def flush(self) -> None:
        """Hands the runtime how long rows have waited since the last time; for just before a window is taken."""
        with self._waits_lock:
            waits, self._waits = self._waits, []
        runtime = self._runtime
        if waits and runtime is not None:
            runtime.record_queueing(waits)

    def answer(self, asked: Request | Refusal) -> Reply:
        """The reply to one request; what the source refused itself is counted and comes back."""
        reply = self._predict(asked) if isinstance(asked, Request) else asked
        if isinstance(reply, Answer):
            self.answered += 1
        else:
            self._count(reply)
        return reply

    def _count(self, refused: Refusal) -> None:
        seen = self.refused.get(refused.reason, 0)
        # A new dictionary: whoever reads it meanwhile has a whole one.
        self.refused = {**self.refused, refused.reason: seen + 1}
        if not seen:
            log.warning("rows_refused reason=%s first=%s", refused.reason, refused.message[:200])

    def _predict(self, request: Request) -> Reply:
        runtime = self._wait_for_runtime()
        if runtime is None:
            return Refusal("unavailable", "there is no model yet; try again later")
        if request.truth is not None:
            problem = _truth_problem(runtime.engine.info.manifest, request)
            if problem:
                return Refusal("truth", problem)
        start_ns = self._clock_ns()
        try:
            prediction = runtime.predict(request.rows)
        except InputError as e:
            return Refusal(e.reason, str(e))
        except BudgetExceeded as e:
            return Refusal("unavailable", str(e))
        except ArtifactError as e:
            return Refusal("failed", str(e))
        if request.arrived_ns:
            with self._waits_lock:
                self._waits.append(max(0, start_ns - request.arrived_ns))
            if len(self._waits) >= WAITS_AT_ONCE:
                self.flush()
        if request.truth is not None:
            labelled, correct = _hits(prediction, request)
            if labelled:
                runtime.record_truth(labelled, correct)
        return Answer(prediction.label, prediction.score, prediction.model)

    def _wait_for_runtime(self) -> Runtime | None:
        while (runtime := self._runtime) is None:
            left = self._waits_until - time.monotonic()
            if left <= 0 or self._stop_event.is_set():
                return None
            self._ready.wait(min(left, TICK_SECONDS))
        return runtime


def _truth_problem(manifest: Manifest, request: Request) -> str:
    """Why the truth of ``request`` cannot be a label of this model; a label never seen in training can."""
    truths = request.truth if request.batch else [request.truth]
    for truth in truths:
        if truth is None or not manifest.outputs:
            continue
        if manifest.multilabels:
            if not isinstance(truth, list) or len(truth) != len(manifest.outputs):
                return f"the truth is {truth!r:.80}; the model has {len(manifest.outputs)} labels for a row"
            pairs: Sequence[tuple[Any, tuple[Label, ...]]] = list(zip(truth, manifest.outputs, strict=True))
        else:
            pairs = [(truth, manifest.labels)]
        for one, labels in pairs:
            if isinstance(one, list):
                return f"the truth is {one!r:.80}; the model has one label for a row"
            if isinstance(one, str) not in {isinstance(label, str) for label in labels}:
                return f"the truth is {one!r:.80}; the model's labels are such as {labels[0]!r:.80}"
    return ""


def _hits(prediction: Prediction, request: Request) -> tuple[int, int]:
    """How many rows of ``request`` have a truth, and how many of those were predicted right.

    A row of several labels is right when all of them are. There are none for a regressor, whose answers are never
    simply right.
    """
    label = prediction.label
    if label is None:
        return 0, 0
    found: Any = label.tolist() if isinstance(label, np.ndarray) else label
    if not request.batch:
        return 1, int(found == request.truth)
    known = [(a, b) for a, b in zip(found, request.truth, strict=True) if b is not None]
    return len(known), sum(a == b for a, b in known)


def make(config: SourceConfig, stop: threading.Event, *, client_id: str) -> Feed | None:
    """The feed that the configuration asks for, not started; None where an application calls `Runtime.predict` itself.

    ``client_id`` names the session with a local broker and must be unique on it. Replayed rows wait for a model
    without limit.

    Raises:
        ConfigError: the file cannot be replayed, the socket cannot be made, or the topics are none.
        LinkError: a certificate cannot be read.
    """
    # Each kind of source is imported where it is wanted: the others would only take memory.
    match config.kind:
        case "none":
            return None
        case "replay":
            from edge_runtime.adapters.sources.replay import ReplaySource  # noqa: PLC0415

            replay = ReplaySource(config.path, rows_per_second=config.rows_per_second, seed=config.seed)
            return Feed(replay, stop, patience_seconds=math.inf)
        case "stdio":
            from edge_runtime.adapters.sources.stdio import StdioSource  # noqa: PLC0415

            return Feed(StdioSource(max_line_bytes=config.max_line_bytes), stop)
        case "unix":
            from edge_runtime.adapters.sources.unix import UnixSource  # noqa: PLC0415

            clients = UnixSource(
                config.socket,
                mode=config.socket_mode,
                max_clients=config.max_clients,
                max_line_bytes=config.max_line_bytes,
            )
            return Feed(clients, stop)
        case "mqtt":
            from edge_runtime.mqtt_source import MqttSource  # noqa: PLC0415

            rng = random.Random()  # noqa: S311 (jitter, no secret)
            topic = MqttSource(
                config.broker,
                client_id=client_id,
                topic_in=config.topic_in,
                topic_out=config.topic_out,
                delay=lambda attempt: next_delay_seconds(attempt, rng),
                max_line_bytes=config.max_line_bytes,
            )
            return Feed(topic, stop)
        case _:
            raise ConfigError(f"source.kind: {config.kind!r} is none of none, replay, stdio, unix and mqtt")

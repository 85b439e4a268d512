"""The update child: ``python -m edge_runtime.updater``. It verifies a release, fetches a model, and has it tried.

One JSON job on stdin; JSON lines on stdout, the last of them ``{"result": …}``. It lives for seconds, so what TUF and
cryptography weigh is never the daemon's. Nothing is believed before it is verified, nothing is parsed before its
digest is checked, and the model is loaded by yet another process (`edge_runtime.probe`) under hard limits.

Messages are capped by the codec, every wait is bounded, and so is the whole job: python-tuf itself has no protection
against slow retrieval.
"""

import contextlib
import fcntl
import json
import random
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any, Final

from edge_runtime.adapters import sandbox
from edge_runtime.adapters.child import end_with_reader, give_way
from edge_runtime.adapters.slots import Slots
from edge_runtime.contract import codec, ids, topics
from edge_runtime.contract.errors import ArtifactError, ContractError, LinkError, SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName
from edge_runtime.contract.messages import SignedRelease, TrustBundle
from edge_runtime.contract.release import Release
from edge_runtime.core.backoff import next_delay_seconds
from edge_runtime.core.budget import Budget, breaches
from edge_runtime.core.lifecycle import needs
from edge_runtime.core.transfer import Action, Append, Ask, Done, Failed, Leave, Transfer
from edge_runtime.link import Connected, Disconnected, Link, Received
from edge_runtime.mqtt.broker import Broker
from edge_runtime.truststore import TrustStore

CONNECT_SECONDS: Final = 30.0
BUNDLE_SECONDS: Final = 15.0
CHUNK_SECONDS: Final = 5.0
PROBE_RUNS: Final = 2000
PROBE_CPU_SECONDS: Final = 60
MAX_JOB_BYTES: Final = 4 << 20


class Refusal(SkiffError):
    """Why the job ends without an update.

    ``retry`` tells whether the same job may do better later; ``digest`` is the model it is held against, if any.
    """

    def __init__(self, reason: str, *, retry: bool, digest: Digest | None = None) -> None:
        super().__init__(reason)
        self.retry = retry
        self.digest = digest


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the daemon asks. Everything is its own state but ``release``, which nobody has verified yet.

    ``floor`` is the highest revision it accepted from the cohort, ``have`` the models that were committed here.
    """

    state_dir: Path
    fleet: FleetId
    cohort: CohortId
    model: ModelName
    device: DeviceId
    broker: Broker
    release: bytes
    root: Path
    floor: int
    serving: Digest | None
    have: frozenset[Digest]
    quarantine: Mapping[Digest, int]
    budget: Budget
    probe_address_space_bytes: int
    deadline_seconds: float

    @classmethod
    def read(cls, document: object) -> "Job":
        """Reads a job; raises `ContractError` naming the field."""
        f = Fields(document, "job")
        serving = f.text("serving")
        return cls(
            state_dir=Path(f.text("state_dir", max_length=4096)),
            fleet=ids.fleet_id(f.text("fleet")),
            cohort=ids.cohort_id(f.text("cohort")),
            model=ids.model_name(f.text("model")),
            device=ids.device_id(f.text("device")),
            broker=_read_broker(f.section("broker")),
            release=bytes.fromhex(f.text("release", max_length=2 * codec.MAX_MESSAGE_BYTES)),
            root=Path(f.text("root", max_length=4096)),
            floor=f.integer("floor"),
            serving=ids.digest(serving) if serving else None,
            have=frozenset(ids.digest(text) for text in f.texts("have")),
            quarantine={ids.digest(text): attempt for text, attempt in f.counts("quarantine")},
            budget=_read_budget(f.section("budgets")),
            probe_address_space_bytes=f.integer("probe_address_space_bytes", low=1),
            deadline_seconds=f.number("deadline_seconds", low=0.0),
        )


def _read_broker(f: Fields) -> Broker:
    return Broker(
        host=f.text("host"),
        port=f.integer("port", low=1, high=65535),
        username=f.text("username", ""),
        password=f.text("password", ""),
        ca=f.text("ca", "", max_length=4096),
        certificate=f.text("certificate", "", max_length=4096),
        key=f.text("key", "", max_length=4096),
        keepalive_seconds=f.integer("keepalive_seconds", 30),
        protocol=f.text("protocol", "auto", choices=topics.PROTOCOLS),
    )


def _read_budget(f: Fields) -> Budget:
    return Budget(predict_p99_ns=f.integer("predict_p99_ns", 0), rss_bytes=f.integer("rss_bytes", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What the probe measured on this device."""

    rss_bytes: int
    predict_p50_ns: int
    predict_p99_ns: int
    runs: int
    golden_rows: int


class Update:
    """One job, from its first wait to its result."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._topics = topics.Topics(job.fleet)
        self._deadline = time.monotonic() + job.deadline_seconds
        self._stage = "trust"
        self._payload = b""

    @cached_property
    def _slots(self) -> Slots:
        return Slots(self._job.state_dir)

    def run(self) -> dict[str, Any]:
        """The result, whatever happened; only a programming error escapes."""
        try:
            with self._alone(), self._alarm():
                return self._run()
        except Refusal as e:
            return self._failed(str(e), retry=e.retry, digest=e.digest)
        except (LinkError, ContractError) as e:
            return self._failed(str(e), retry=True)
        except OSError as e:
            return self._failed(f"{e}: check the disk and permissions of {self._job.state_dir}", retry=True)

    def _failed(self, reason: str, *, retry: bool, digest: Digest | None = None) -> dict[str, Any]:
        return {
            "ok": False,
            "stage": self._stage,
            "reason": reason,
            "retry": retry,
            "digest": digest or "",
            "release": self._payload.hex(),
        }

    def _run(self) -> dict[str, Any]:
        job = self._job
        probed = None
        with self._linked() as link, TrustStore(job.state_dir / "trust", self._pinned_root()) as trusted:
            trusted.refresh(self._bundle(link, trusted.pinned_version))
            self._stage = "release"
            release = self._believe(trusted)
            action, digest = needs(
                release, job.device, serving=job.serving, have=job.have, quarantine=job.quarantine
            )
            if action in ("install", "switch") and digest is not None and trusted.is_revoked(digest):
                raise Refusal(f"model {digest} was revoked: release another one", retry=False, digest=digest)
            if action == "install" and digest is not None:
                length = self._approved(trusted, digest)
                _say({"progress": "fetching", "digest": digest})
                self._stage = "fetch"
                self._fetch(link, digest, length)
        if action == "install" and digest is not None:
            _say({"progress": "verified", "digest": digest})
            self._stage = "probe"
            probed = self._probe(digest)
            _say({"progress": "probed", "digest": digest})
        return {
            "ok": True,
            "release": self._payload.hex(),
            "desired": digest or "",
            "action": action,
            "probe": asdict(probed) if probed is not None else None,
        }

    # ── bounds ─────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two children of one device would undo each other's record."""
        folder = self._job.state_dir / "trust"
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise Refusal("another update of this device is still running", retry=True) from e
            yield

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        """The bound of last resort, a second after the deadline: every wait should have ended before."""

        def ring(*_: object) -> None:
            raise Refusal(
                f"the deadline of {self._job.deadline_seconds:g} s passed in stage {self._stage!r}",
                retry=True,
            )

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.0, self._left()) + 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    # ── network ────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _linked(self) -> Iterator[Link]:
        job = self._job
        rng = random.Random()  # noqa: S311 (jitter, no secret)
        link = Link(
            job.broker,
            client_id=f"{job.device}-update",
            delay=lambda attempt: next_delay_seconds(attempt, rng),
        )
        link.start()
        try:
            until = min(self._deadline, time.monotonic() + CONNECT_SECONDS)
            reason = "no answer"
            while not isinstance(event := link.poll(_wait(until)), Connected):
                if isinstance(event, Disconnected):
                    reason = event.reason
                if time.monotonic() >= until:
                    raise LinkError(
                        f"broker {job.broker.host}:{job.broker.port} cannot be reached ({reason})"
                    )
            yield link
        finally:
            link.stop(timeout=2.0)

    def _bundle(self, link: Link, root_version: int) -> TrustBundle:
        """Asked for by the pinned root's version: the chain from there on holds whatever the disk has lost."""
        topic = self._topics.trust(root_version)
        until = min(self._deadline, time.monotonic() + BUNDLE_SECONDS)
        link.subscribe(topic)
        while True:
            event = link.poll(_wait(until))
            if isinstance(event, Received) and event.topic == topic and event.payload:
                message = codec.decode(event.payload)
                if not isinstance(message, TrustBundle):
                    raise ContractError(f"{topic}: a {type(message).__name__} instead of trust metadata")
                link.unsubscribe(topic)
                return message
            if time.monotonic() >= until:
                raise LinkError(f"nothing is retained on {topic}: publish the repository to this broker")

    def _fetch(self, link: Link, digest: Digest, length: int) -> None:
        """Brings the blob into its slot; an interrupted transfer goes on where its staging file ends."""
        if self._slots.has(digest, verify=True):
            return
        path = self._slots.staging(digest)
        have = _whole_chunks(path, length)
        try:
            transfer = Transfer(
                length=length, have=have, deadline_seconds=self._deadline, patience_seconds=CHUNK_SECONDS
            )
        except ContractError as e:
            raise Refusal(str(e), retry=False, digest=digest) from e
        by_topic = {self._topics.chunk(digest, i): i for i in range(topics.chunk_count(length))}
        with path.open("ab") as staging:
            actions = transfer.start(time.monotonic())
            while not transfer.over:
                self._perform(link, digest, actions, staging)
                event = link.poll(_wait(transfer.due_seconds()))
                now = time.monotonic()
                actions = transfer.tick(now)
                if isinstance(event, Received) and event.topic in by_topic and not transfer.over:
                    actions += transfer.chunk(by_topic[event.topic], event.payload, now)
            self._perform(link, digest, actions, staging)
        self._stage = "verify"
        try:
            self._slots.install(digest)
        except ArtifactError as e:
            # Somebody on the way changed it: nothing is held against the model.
            raise Refusal(f"{e}: publish the model's chunks again", retry=True) from e

    def _perform(self, link: Link, digest: Digest, actions: list[Action], staging: IO[bytes]) -> None:
        for action in actions:
            match action:
                case Ask(index, again):
                    topic = self._topics.chunk(digest, index)
                    if again:  # only a new subscription makes the broker send what it retains once more
                        link.unsubscribe(topic)
                    link.subscribe(topic)
                case Leave(index):
                    link.unsubscribe(self._topics.chunk(digest, index))
                case Append(data):
                    staging.write(data)
                case Failed(reason):
                    raise Refusal(f"model {digest}: {reason}", retry=True)
                case Done():
                    pass

    # ── trust ──────────────────────────────────────────────────────────────────────────────────────────

    def _pinned_root(self) -> bytes:
        try:
            return self._job.root.read_bytes()
        except OSError as e:
            raise ContractError(
                f"the pinned root {self._job.root} cannot be read ({e.strerror}): provision 1.root.json there"
            ) from e

    def _believe(self, trusted: TrustStore) -> Release:
        """The release, once its signature is good, it is meant for this device, and it is not an old one."""
        job = self._job
        message = codec.decode(job.release)
        if not isinstance(message, SignedRelease):
            raise Refusal(f"a {type(message).__name__} instead of a release", retry=False)
        release = trusted.read_release(message)
        for what, found, own in (
            ("fleet", release.fleet, job.fleet),
            ("cohort", release.cohort, job.cohort),
            ("model", release.model, job.model),
        ):
            if found != own:
                raise Refusal(
                    f"the release is meant for {what} {found!r}, this device has {own!r}", retry=False
                )
        if release.revision < job.floor:
            raise Refusal(
                f"revision {release.revision} is older than {job.floor}, which this device has accepted",
                retry=False,
            )
        try:
            trusted.accept(release, message.payload)
        except ContractError as e:
            raise Refusal(str(e), retry=False) from e
        self._payload = message.payload
        return release

    def _approved(self, trusted: TrustStore, digest: Digest) -> int:
        """The model's length in bytes, when the publisher vouches for it."""
        length = trusted.find(self._job.model, digest)
        if length is None:
            raise Refusal(
                f"model {digest} is no target of family {self._job.model!r} in the trust metadata: publish it, or "
                "release a published one",
                retry=True,
            )
        return length

    # ── probe ──────────────────────────────────────────────────────────────────────────────────────────

    def _probe(self, digest: Digest) -> Probed:
        """Has the model tried in a process of its own, and compares with the budgets."""
        job = self._job
        answer = Fields(self._ask_probe(digest), "probe")
        if not answer.flag("ok"):
            raise Refusal(answer.text("reason", max_length=4096), retry=False, digest=digest)
        if answer.text("model") != job.model:
            raise Refusal(
                f"the artifact says it is {answer.text('model')!r}, not {job.model!r}",
                retry=False,
                digest=digest,
            )
        found = Probed(
            rss_bytes=answer.integer("rss_bytes"),
            predict_p50_ns=answer.integer("predict_p50_ns"),
            predict_p99_ns=answer.integer("predict_p99_ns"),
            runs=answer.integer("runs"),
            golden_rows=answer.integer("golden_rows"),
        )
        budget = job.budget.tightest(_read_budget(answer.section("budgets")))
        if problems := breaches(budget, predict_p99_ns=found.predict_p99_ns, rss_bytes=found.rss_bytes):
            raise Refusal(
                f"{'; '.join(problems)} (median {found.predict_p50_ns / 1e3:.1f} us over {found.runs} rows): train a "
                "smaller model, or raise the budget in the device's configuration or the artifact",
                retry=False,
                digest=digest,
            )
        return found

    def _ask_probe(self, digest: Digest) -> object:
        task = {
            "model": str(self._slots.blob(digest)),
            "digest": digest,
            "address_space_bytes": self._job.probe_address_space_bytes,
            "cpu_seconds": PROBE_CPU_SECONDS,
            "runs": PROBE_RUNS,
        }
        try:
            ended = sandbox.run("edge_runtime.probe", task, timeout_seconds=self._left())
        except TimeoutError as e:
            raise Refusal(f"model {digest}: the deadline passed during the probe", retry=True) from e
        try:
            if ended.code == 0:
                return json.loads(ended.answer)
        except ValueError as e:
            raise Refusal(
                f"model {digest}: the probe's answer is garbled ({e})", retry=False, digest=digest
            ) from e
        words = f" ({ended.words})" if ended.words else ""
        raise Refusal(f"model {digest}: the probe {ended.how}{words}", retry=False, digest=digest)


def _whole_chunks(path: Path, length: int) -> int:
    """How many leading chunks the staging file at ``path`` holds; what cannot be used is cut off."""
    size = path.stat().st_size if path.exists() else 0
    if size == length:
        return topics.chunk_count(length)
    have = size // topics.CHUNK_BYTES if size < length else 0
    if size:
        with path.open("r+b") as staging:
            staging.truncate(have * topics.CHUNK_BYTES)
    return have


def _wait(until: float) -> float:
    return max(0.0, until - time.monotonic())


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Entry point: 0 with a result on stdout, 2 when the job on stdin is none."""
    end_with_reader()
    give_way()
    try:
        job = Job.read(json.loads(sys.stdin.buffer.read(MAX_JOB_BYTES)))
    except (ValueError, ContractError) as e:
        sys.stderr.write(f"updater: not a job ({e})\n")
        return 2
    _say({"result": Update(job).run()})
    return 0


if __name__ == "__main__":
    sys.exit(main())

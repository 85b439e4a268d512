"""A device's life with updates on a disk that is recorded: what the crash tests replay."""

import contextlib
import json
import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.adapters.slots import Slots
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.topics import Topics
from edge_runtime.core import events as core
from tests.publisher import FLEET
from tests.support.crash_bench import CHUNK_BYTES, SHADOW, Bench, Device, heavy
from tests.support.crash_model import Machine
from tests.support.recorder import Recorder
from tests.support.web import Visit


@dataclass(frozen=True, slots=True, eq=False)
class Kept:
    """A record that a store was told to write: between which changes, and what."""

    store: str
    begun: int
    done: int
    document: dict[str, Any]


@dataclass(frozen=True, slots=True, eq=False)
class Promise:
    """What a device may rely on after a crash: one of these records of each store, the first being durable already.

    None stands for no record.
    """

    records: tuple[dict[str, Any] | None, ...]
    trust: tuple[dict[str, Any] | None, ...]

    @property
    def quarantine(self) -> dict[str, int]:
        """What must not be tried again, with the attempts that failed: whatever record is found says so.

        A model whose trial a later attempt began is not among them.
        """
        records = [record or {} for record in self.records]
        found = [{q["digest"]: q["attempt"] for q in record.get("quarantine", ())} for record in records]
        tried = {(record.get("trial") or {}).get("digest") for record in records}
        return {
            d: min(f[d] for f in found) for d in found[0] if d not in tried and all(d in f for f in found)
        }


@dataclass
class Life:
    """A recorded life below ``recorder.root``: the changes of the disk, and the records that were promised on the way.

    ``first`` has the records that were durable before it, by store.
    """

    recorder: Recorder
    first: Mapping[str, Kept] = field(default_factory=dict)
    kept: list[Kept] = field(default_factory=list)
    _promises: dict[tuple[tuple["Kept | None", ...], ...], Promise] = field(default_factory=dict)

    def __post_init__(self) -> None:
        root, self._nodes = self.recorder.root, self.recorder.nodes
        known = [path for path in self._nodes if not ignored(path)]
        self._folders = [path for path in known if (root / path).is_dir()]
        self._files = {path: (root / path).read_bytes() for path in known if path not in self._folders}

    def machine(self) -> Machine:
        """The disk before all of it."""
        return Machine(self._files, self._folders, self._nodes, ignored)

    @contextlib.contextmanager
    def recorded(self) -> Iterator[None]:
        """Every change and every record is written down until this is left."""
        root = self.recorder.root
        with pytest.MonkeyPatch.context() as patch, self.recorder.standing():
            real = Slots.write_record

            def write_record(slots: Slots, record: Any) -> None:
                begun = len(self.recorder.changes)
                document = json.loads(json.dumps(record))
                store = str(slots._root.relative_to(root))
                self.kept.append(Kept(store, begun, 1 << 60, document))
                real(slots, record)
                self.kept[-1] = replace(self.kept[-1], done=len(self.recorder.changes))

            patch.setattr(Slots, "write_record", write_record)
            yield

    def promise(self, after: int) -> Promise:
        """What holds when the power fails after change number ``after``; the same object where nothing changed."""
        spans = (self._span("state", after), self._span("state/trust", after))
        if spans not in self._promises:
            self._promises[spans] = Promise(
                *(tuple(None if k is None else k.document for k in s) for s in spans)
            )
        return self._promises[spans]

    def _span(self, store: str, after: int) -> tuple["Kept | None", ...]:
        """The last record that was durable by then, and those whose writing had begun."""
        found = [self.first.get(store)]
        for kept in self.kept:
            if kept.store == store and kept.begun < after:
                found = [kept] if kept.done <= after else [*found, kept]
        return tuple(found)


def ignored(path: str) -> bool:
    """What no start depends on: the judge puts anything there."""
    return path.startswith(("state/trust/scratch", "state/trust/lock", "state/outbox.db"))


class Story:
    """An eventful life; ``seed`` says in which order the middle of it happens."""

    def __init__(self, bench: Bench, home: Path, seed: int) -> None:
        self.bench = bench
        self.config = bench.configure(home)
        self.device = Device(self.config, bench.clocks)
        self.told: list[str] = []
        self._seed = seed
        self._models = iter(range(1000 * seed + 1, 1000 * seed + 1000))
        self.life = Life(Recorder(home))

    def live(self) -> None:
        """From the first start on an empty disk to the end."""
        middle = [
            self.commits,
            self.resumes,
            self.fails_to_start,
            self.is_withdrawn,
            self.is_revoked,
            self.goes_back,
            self.is_tampered_with,
            self.is_tried_again,
            self.passes_in_the_shadow,
            self.disagrees_in_the_shadow,
        ]
        random.Random(self._seed).shuffle(middle)
        with self.bench.standing(), self.life.recorded():
            self.device.boot()
            self.commits()
            self.commits()
            for episode in middle:
                episode()
            self.device.daemon._shut_down()
            self.device.daemon._watch.end()

    def _new(self) -> Digest:
        return self.bench.publish(heavy(next(self._models)))

    def _commit(self, digest: Digest) -> None:
        self.device.turn_until(lambda s: s.committed == digest and s.trial is None, rows=4)

    @contextlib.contextmanager
    def _web_does(self, answer: Callable[[Visit, bytes], None]) -> Iterator[None]:
        """The web server, where there is one, answers who asks for all of a model so, and nobody who asks for more."""

        def behave(visit: Visit) -> None:
            if not visit.path.startswith("/targets/"):
                visit.serve()
            elif visit.asked.start is None and visit.data is not None:
                answer(visit, visit.data)

        if self.bench.web is None:
            yield
            return
        self.bench.web.behave = behave
        yield
        self.bench.web.behave = None

    def commits(self) -> None:
        digest = self._new()
        self.device.hear(self.bench.offer(digest))
        self.device.turn_until(lambda s: s.trial is not None)
        self.device.turn(rows=3)
        self.device.reboot()
        assert self.device.serving == digest
        self._commit(digest)
        self.told.append("committed")

    def resumes(self) -> None:
        """One chunk comes late, the web server sends no more than the first, and the power fails meanwhile."""
        digest = self._new()
        topic = Topics(FLEET).chunk(digest, 1)
        late = self.bench.broker.retained.pop(topic)
        message = self.bench.offer(digest)
        with self._web_does(lambda visit, data: visit.say(200, data[:CHUNK_BYTES], length=len(data))):
            self.device.hear(message)
            self.device.turn()
        assert self.device.slots.trial is None
        assert Slots(self.config.state_dir).staging(digest).stat().st_size == CHUNK_BYTES
        self.device.reboot()
        self.bench.broker.retained[topic] = late
        self.device.hear(message)
        self._commit(digest)
        self.told.append("resumed")

    def fails_to_start(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        self.device.hear(self.bench.offer(digest))
        self.device.turn_until(lambda s: s.trial is not None)
        while self.device.slots.trial is not None:
            self.device.reboot()
        assert digest in dict(self.device.slots.quarantine)
        assert self.device.serving == before
        self.device.hear(self.bench.offer(digest))
        self.device.turn()
        assert self.device.serving == before
        self.told.append("quarantined")

    def is_withdrawn(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        self.device.hear(self.bench.offer(digest))
        self.device.turn_until(lambda s: s.trial is not None)
        self.device.turn(rows=2)
        self.device.hear(self.bench.offer(None, incumbent=before))
        self.device.turn_until(lambda s: s.trial is None)
        assert self.device.serving == before
        self.told.append("withdrawn")

    def is_revoked(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        self.bench.revoke(digest)
        self.device.hear(self.bench.offer(digest))
        self.device.turn_until(lambda s: digest in dict(s.quarantine))
        assert self.device.serving == before
        self.told.append("revoked")

    def goes_back(self) -> None:
        before = self.device.slots.previous
        assert before is not None
        self.device.hear(self.bench.offer(before))
        self.device.turn_until(lambda s: s.committed == before)
        assert self.device.serving == before
        self.told.append("switched")

    def is_tampered_with(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        topic = Topics(FLEET).chunk(digest, 2)
        good = self.bench.broker.retained[topic]
        self.bench.broker.retained[topic] = b"X" + good[1:]
        with self._web_does(lambda visit, data: visit.say(200, data[:-1] + b"X")):
            self.device.hear(self.bench.offer(digest))
            self.device.turn()
        assert self.device.serving == before
        assert not Slots(self.config.state_dir).staging(digest).exists()
        self.bench.broker.retained[topic] = good
        self._commit(digest)
        self.told.append("tampered")

    def is_tried_again(self) -> None:
        """What failed once may be tried again on purpose."""
        digest, before = self._new(), self.device.slots.committed
        self.device.hear(self.bench.offer(digest))
        self.device.turn_until(lambda s: s.trial is not None)
        self.device.daemon._handle(core.ServeFailed(digest, "too large for this device"))
        assert self.device.serving == before
        self.device.hear(self.bench.offer(digest, attempt=2))
        self._commit(digest)
        self.told.append("tried again")

    def passes_in_the_shadow(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        self.device.hear(self.bench.offer(digest, shadow=SHADOW))
        self.device.turn_until(lambda s: s.shadowing == digest)
        assert self.device.serving == before
        self.device.turn(rows=2)
        self.device.reboot()
        assert self.device.slots.shadowing == digest
        assert self.device.serving == before
        self._commit(digest)
        self.told.append("shadowed")

    def disagrees_in_the_shadow(self) -> None:
        digest, before = self._new(), self.device.slots.committed
        self.bench.disagreed = SHADOW.rows // 4
        self.device.hear(self.bench.offer(digest, shadow=SHADOW))
        self.device.turn_until(lambda s: digest in dict(s.quarantine))
        self.bench.disagreed = 0
        assert self.device.serving == before
        self.told.append("disagreed")

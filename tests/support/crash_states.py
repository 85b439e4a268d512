"""Every state that a crash may leave, as many as asked for: ``python -m tests.support.crash_states N``.

Lives with updates are recorded (`crash_story`), the disks that a crash at each instant may leave are told from that
(`crash_model`), and a device is started on each (`crash_judge`). Stories differ in their order of events; a state
counts once, however it comes about. The last line says how many there were, and how many broke a promise.
"""

import argparse
import contextlib
import hashlib
import itertools
import logging
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.contract.release import TrialGate
from tests.support.crash_bench import Bench, heavy
from tests.support.crash_judge import Broken, Judge
from tests.support.crash_model import State
from tests.support.crash_story import Life, Story
from tests.support.recorder import Change

MEMORY = Path("/dev/shm")
PER_STORY = 4000
FINISH_EVERY = 200
"""Of so many states one is followed to the end of an update, with everything real."""
AGAIN = 5
"""So many states are taken from each such end: the power fails once more, while the device recovers."""
SHOWN = 10
PROGRESS_SECONDS = 5.0
DULL = 20
"""Random states of an instant that were all seen before; then there are no more to be expected."""


@dataclass
class Found:
    """What came of it: distinct states, updates that were followed to their end, and what was broken."""

    states: int = 0
    finished: int = 0
    again: int = 0
    problems: list[str] = field(default_factory=list)
    seen: set[bytes] = field(default_factory=set)

    @property
    def bad(self) -> int:
        return len(self.problems)


class Explorer:
    """The states of one life, in rounds over its instants: the plainest of each first.

    ``changes`` takes the place of what was recorded, one for one, to see what other calls would have left.
    """

    def __init__(
        self, life: Life, judge: Judge, rng: random.Random, changes: Sequence[Change | None] | None = None
    ) -> None:
        self._changes = life.recorder.changes if changes is None else changes
        self._judge = judge
        self._rng = rng
        machine = life.machine()
        self._instants = [machine.now()]
        for change in self._changes:
            if machine.apply(change):
                self._instants.append(machine.now())
        self._promises = {instant.after: life.promise(instant.after) for instant in self._instants}
        self._digests: dict[bytes, bytes] = {}

    def explore(self, found: Found, count: int, told: Callable[[Found], None] = lambda _: None) -> None:
        """Judges states until there are ``count`` more that were not seen before, or all there are."""
        for _ in self.judged(found, count):
            told(found)

    def judged(self, found: Found, count: int, *, skip: int = 0) -> Iterator[Found]:
        """The same, one state after the other; without the ``skip`` plainest of each instant."""
        until = found.states + count
        with self._judge.standing():
            for state, key in self._states(skip):
                if found.states >= until:
                    return
                found.states += key not in found.seen
                found.seen.add(key)
                if problem := self._judge.problem(state, self._promises[state.after], self._rng):
                    found.problems.append(f"{self._where(state)}: {problem}")
                yield found

    def finish(
        self, found: Found, count: int, bench: Bench, told: Callable[[Found], None] = lambda _: None
    ) -> None:
        """Follows an update to its end on ``count`` random states, and explores some states of that in turn."""
        wanted = bench.publish(heavy(999))
        gate = TrialGate(predictions=8, seconds=1.0, starts=2)
        release = (bench.offer(wanted, trial=gate), wanted)
        for _ in range(count):
            states = self._rng.choice(self._instants).states(self._rng)
            *_, state = itertools.islice(states, self._rng.randint(1, 12))
            found.finished += 1
            try:
                life = self._judge.finish(state, self._promises[state.after], self._rng, release)
            except Broken as e:
                found.problems.append(f"{self._where(state)}: {e}")
                continue
            before, after = found.states, Explorer(life, self._judge, self._rng)
            self._rng.shuffle(after._instants)
            after.explore(found, AGAIN, told)
            found.again += found.states - before

    def _states(self, skip: int) -> Iterator[tuple[State, bytes]]:
        """Distinct states with their keys, until no new one turns up; once more where other things are promised."""
        seen = set()
        running = {
            n: itertools.islice(instant.states(self._rng), skip, None)
            for n, instant in enumerate(self._instants)
        }
        dull = dict.fromkeys(running, 0)
        while running:
            for n in list(running):
                state = next(running[n], None)
                if state is None or dull[n] > DULL:
                    del running[n]
                    continue
                key = self._key(state)
                case = (key, self._promises[state.after])
                dull[n] = dull[n] + 1 if case in seen else 0
                if case not in seen:
                    seen.add(case)
                    yield state, key

    def _key(self, state: State) -> bytes:
        """Tells one tree of files from another."""
        parts = [f"{name}/" for name in sorted(state.folders)]
        parts += [f"{name}={self._digest(data).hex()}" for name, data in sorted(state.files.items())]
        return hashlib.blake2b("\n".join(parts).encode(), digest_size=16).digest()

    def _digest(self, data: bytes) -> bytes:
        if data not in self._digests:
            self._digests[data] = hashlib.blake2b(data, digest_size=16).digest()
        return self._digests[data]

    def _where(self, state: State) -> str:
        last = self._changes[state.after - 1] if state.after else None
        return f"after change {state.after} ({type(last).__name__} {last.path})" if last else "before all"


def run(count: int, folder: Path, seed: int = 0, told: Callable[[Found], None] = lambda _: None) -> Found:
    """Explores ``count`` states of as many stories as that takes, two at least: every other fetches by HTTPS first."""
    found, rng = Found(), random.Random(seed)
    for number in itertools.count(seed):
        home = folder / str(number)
        bench = Bench.make(home)
        with bench.on_the_web() if number % 2 else contextlib.nullcontext():
            story = Story(bench, home / "device", number)
            story.live()
            judge = Judge(bench, story.config, home / "states")
            explorer = Explorer(story.life, judge, rng)
            quota = min(PER_STORY, -(-count // 2), count - found.states)
            until = found.states + quota
            explorer.finish(found, quota // FINISH_EVERY, bench, told)
            explorer.explore(found, until - found.states, told)
            judge.check_pool()
        if found.states >= count:
            return found
    raise AssertionError


def main() -> int:
    """Entry point: 0 when no promise was broken, 1 otherwise."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("count", type=int, help="how many distinct states")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the first story and of what is drawn at random"
    )
    arguments = parser.parse_args()
    logging.getLogger("skiffd").setLevel(logging.CRITICAL)  # damaged outboxes are put there on purpose
    begun = shown = time.monotonic()

    def told(found: Found) -> None:
        nonlocal shown
        if time.monotonic() - shown > PROGRESS_SECONDS:
            shown = time.monotonic()
            print(f"{found.states} of {arguments.count} states, {found.bad} bad", file=sys.stderr, flush=True)

    with tempfile.TemporaryDirectory(dir=MEMORY if MEMORY.is_dir() else None) as folder:
        found = run(arguments.count, Path(folder), arguments.seed, told)
    for problem in found.problems[:SHOWN]:
        print(problem)
    print(
        f"{time.monotonic() - begun:.0f} s; {found.finished} updates followed to their end, "
        f"{found.again} of the states are from those"
    )
    print(f"states={found.states} bad={found.bad}")
    return 1 if found.bad else 0


if __name__ == "__main__":
    sys.exit(main())

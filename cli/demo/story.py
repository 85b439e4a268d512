"""The demonstration, step by step. Each step ends with a check of what the running parts stored or reported."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any, Final

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from aggregator.records import Selection
from cli.broker import HOST, prepare_broker, wait_for_port
from cli.demo.devices import FLEET, MODEL, Device, provision
from cli.models import read_artifact
from cli.orders import order
from cli.output import err, progress
from cli.processes import Processes, wait_until
from cli.proof import certificate_table
from cli.publishing import publish
from cli.view import FleetView
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.mqtt.broker import Broker
from trainer.datasets import load_watch
from trainer.publish import Repository
from trainer.release import run as make_release
from trainer.spec import load as load_spec

SPECS: Final = Path(str(files("cli.demo"))) / "specs"
CANARIES: Final = 3
UNSEEN: Final = tuple(str(person) for person in (7, 8, 9, 10))
"""People no model is trained on: accuracy is always theirs."""
CLEAR_DROP: Final = 0.05
"""Accuracy has to fall, and to come back, by at least this much to count as shown."""
ENOUGH_LABELLED: Final = 4000
TRAIN_3: Final = "train-3"
MOVED: Final = "wrist=right"
MOST_INCIDENTS: Final = 10_000
SHOWN: Final = 5


class StepFailed(SkiffError):
    """What a step of the demonstration should have shown did not happen."""


@dataclass(slots=True)
class Moments:
    """What happened when, for the report."""

    start_ns: int
    items: list[tuple[int, str]] = field(default_factory=list)

    def mark(self, text: str) -> None:
        """Remembers that ``text`` happened now."""
        self.items.append((time.time_ns(), text))


class Story:
    """The demonstration in a work folder; call the steps in order. A step raises `SkiffError` when it was not shown."""

    def __init__(self, work: Path, processes: Processes, *, embedded_broker: bool = False) -> None:
        self.work = work
        self.processes = processes
        self.moments = Moments(time.time_ns())
        self.repository = Repository.create(work / "repository")
        self.versions: dict[str, Digest] = {}
        self.devices: list[Device] = []
        self.view: FleetView
        self.alarms: list[dict[str, Any]] = []
        self.broker_name = ""
        self._embedded_broker = embedded_broker
        self._broker: Broker
        self._step_started = time.monotonic()

    # ── helpers ────────────────────────────────────────────────────────────────────────────────────────

    def _step(self, number: int, title: str) -> None:
        self._step_started = time.monotonic()
        err.print(f"\n[bold]{number}. {title}[/bold]")

    def _say(self, text: str) -> None:
        took = time.monotonic() - self._step_started
        err.print(f"   [green]✓[/green] {escape(text)}  [dim]{took:.1f} s[/dim]", soft_wrap=True)

    def _wait(self, what: str, condition: Callable[[], bool], *, timeout_seconds: float) -> None:
        start = time.monotonic()
        with err.status(f"waiting: {what}") as status:

            def check() -> None:
                self.processes.check()
                status.update(f"waiting: {what} ({time.monotonic() - start:.0f} s)")

            wait_until(condition, timeout_seconds=timeout_seconds, what=what, check=check)

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise StepFailed(problem)

    def _on(self, wrist: str) -> list[Device]:
        return [device for device in self.devices if device.wrist == wrist]

    def _start_devices(self, devices: Sequence[Device]) -> None:
        for device in devices:
            self.processes.start(device.name, device.command, restart=True)

    def _offer(self, digest: Digest, stages: list[int | float], *, why: str) -> None:
        document = {"model": MODEL, "candidate": digest, "stages": stages}
        order(self.view, "start_rollout", document, by="demo", why=why)

    def _artifact(self, version: str) -> Path:
        return self.work / f"watch-{version}.onnx"

    def _check_proof(self, version: str) -> dict[str, Any]:
        data, info = read_artifact(self._artifact(version))
        self._require(
            info.certificate["passed"] is True, f"version {version} does not agree with its pipeline"
        )
        self.versions[version] = digest_of(data)
        return dict(info.certificate)

    def _publish(self, version: str, *, role: str) -> Digest:
        published = self.repository.add(self._artifact(version), role=role)
        size = publish(self.repository, [published.digest], fleet=FLEET, broker=self._broker)
        keys = "both targets keys" if role == "targets" else "the builder key"
        self._say(
            f"signed by {keys}; {size / 1e3:.0f} kB of chunks and metadata retained on {self.broker_name}"
        )
        return published.digest

    def accuracy(self, wrist: str, version: str) -> tuple[int, int]:
        """Labelled and correct rows of people 7 to 10 on one wrist under one version, from the stored windows."""
        return self.view.accuracy(self.versions[version], {"wrist": (wrist,), "person": UNSEEN})

    def _share(self, wrist: str, version: str) -> float:
        labelled, correct = self.accuracy(wrist, version)
        self._require(labelled > 0, f"no labelled rows on the {wrist} wrist under version {version} yet")
        return correct / labelled

    def _wait_serving(self, version: str, count: int) -> None:
        digest = self.versions[version]

        def served() -> bool:
            for device, outcome, reason in self.view.outcomes(MODEL, digest):
                raise StepFailed(f"{device} {outcome.replace('_', ' ')} version {version}: {reason}")
            return self.view.serving(MODEL).get(digest, 0) >= count

        self._wait(f"{count} devices have committed version {version}", served, timeout_seconds=90)

    def _wait_rollout(self, state: str, version: str) -> None:
        def reached() -> bool:
            found = self.view.rollout(MODEL)
            if found is None or found.candidate != self.versions[version]:
                return False
            if found.state != state and found.state in ("completed", "halted", "rolled_back"):
                raise StepFailed(f"the rollout of version {version} is {found.state}: {found.note}")
            return found.state == state

        self._wait(f"the rollout of version {version} is {state}", reached, timeout_seconds=120)

    # ── the steps ──────────────────────────────────────────────────────────────────────────────────────

    def train(self) -> None:
        """Step 1: fit, evaluate, convert, prove."""
        self._step(1, "Train on people 1-6, left wrist; convert; prove parity on hostile rows")
        spec = SPECS / "watch-3.toml"
        self.processes.start(
            TRAIN_3,
            ("nice", sys.executable, "-m", "cli.main", "train", str(spec), "--out", str(self._artifact("3"))),
        )
        with progress("model 1") as bar:
            made = make_release(load_spec(SPECS / "watch-1.toml"), self._artifact("1"), progress=bar)
        err.print(Padding(certificate_table(self._check_proof("1")), (0, 0, 0, 3)))
        for name, accuracy in made.evaluation:
            self._say(f"accuracy on people 7-10, {name}: {accuracy:.3f}")

    def publish(self) -> None:
        """Step 2: sign and publish; broker, aggregator and the left-wrist fleet; everyone serves version 1."""
        self._step(2, "Publish it signed; start a broker, the aggregator and ten left-wrist devices")
        self.repository.enable_auto(MODEL)
        command = prepare_broker(self.work / "broker", embedded=self._embedded_broker)
        self.processes.start("broker", command.command, restart=True)
        wait_for_port(command.port, lambda: self.processes.alive("broker"))
        self.broker_name = command.name
        self._broker = Broker(host=HOST, port=command.port)
        digest = self._publish("1", role="targets")
        self._start_aggregator()
        self.devices = provision(
            self.work / "devices",
            load_watch(),
            broker_port=command.port,
            root=self.repository.pinned_root,
            base=Path(str(files("device_configs") / "simulator.toml")),
        )
        left = self._on("left")
        self._start_devices(left)
        self._wait("ten devices online", lambda: len(self.view.online()) >= len(left), timeout_seconds=60)
        self._say("ten skiffd processes are online")
        self._offer(digest, [1.0], why="the first model")
        self._wait_serving("1", len(left))
        self.moments.mark("version 1 serves on the left wrists")
        self._say("each has fetched, verified and probed it, re-run its golden rows, and committed it")

    def _start_aggregator(self) -> None:
        config = self.work / "aggregator.toml"
        retrain = [
            *(sys.executable, "-m", "cli.main", "retrain", "{request}"),
            *("--spec", str(SPECS / "watch-2.toml"), "--out", str(self._artifact("2"))),
            *("--repository", str(self.work / "repository"), "--aggregator", str(config)),
            *("--stages", f"{CANARIES},1.0"),
        ]
        quoted = ", ".join(f"'{word}'" for word in retrain)
        config.write_text(
            (SPECS / "aggregator.toml").read_text(encoding="utf-8")
            + f'\n[broker]\nhost = "{HOST}"\nport = {self._broker.port}\n'
            + f"\n[retrain]\ncommand = [{quoted}]\n",
            encoding="utf-8",
        )
        self.processes.start(
            "aggregator", (sys.executable, "-m", "cli.main", "serve", str(config)), restart=True
        )
        self.view = FleetView(config)
        self._wait("the aggregator's stores", self.view.ready, timeout_seconds=30)

    def healthy(self) -> None:
        """Step 3: the fleet is like its training, its first looks become its past, and then nothing has moved."""
        self._step(3, "Healthy phase: windows arrive, and the fleet is looked at")
        standing: dict[str, dict[str, Any]] = {}

        def stable(kind: str) -> bool:
            rows = [row for row in self.view.table("verdicts") if row["cohort"] == "fleet"]
            standing.update((row["kind"], row["document"]) for row in rows)
            return kind in standing and standing[kind]["outcome"] == "stable"

        self._wait("a verdict on ten devices", lambda: stable("skew"), timeout_seconds=90)
        skew = standing["skew"]
        groups = len(read_artifact(self._artifact("1"))[1].reference.groups)
        self._say(
            f"as in training: {skew['judged']} devices against {groups} training people, "
            f"no feature stands out (smallest p {skew['p']:.2g})"
        )
        self._wait("a verdict on their own past", lambda: stable("drift"), timeout_seconds=120)
        kinds = sorted(kind for kind, verdict in standing.items() if verdict["outcome"] == "stable")
        self._say(
            f"as in their own first looks, at look {standing['drift']['look']}: {', '.join(kinds)} stable"
        )
        self._require(not self.view.table("incidents"), "an alarm was raised in the healthy phase")
        self._say(f"{self.view.figures().windows} windows stored, each once")
        self.moments.mark("the fleet is found stable")

    def world_moves(self) -> None:
        """Step 4: the other wrist joins; incidents name what is not as in training; accuracy is low."""
        self._step(4, "The world moves: ten right-wrist devices join")
        self._start_devices(self._on("right"))
        self.moments.mark("right wrists join")
        self._wait_serving("1", len(self.devices))
        self._say("they fetched and committed version 1 as well")

        def alarmed() -> bool:
            rows = self.view.table("incidents", MOST_INCIDENTS)
            found = [row for row in rows if row["kind"] == "skew" and row["cohort"] == MOVED]
            self.alarms = sorted(found, key=lambda row: -abs(evidence_of(row)["z"]))
            return bool(found)

        self._wait(f"a skew incident of {MOVED}", alarmed, timeout_seconds=90)
        self.moments.mark("skew incidents")
        of_left = [r for r in self.view.table("incidents", MOST_INCIDENTS) if r["cohort"] == "wrist=left"]
        self._require(not of_left, "an incident of the left wrist was opened, which has not moved")
        first = self.alarms[0]
        self._say(
            f"{MOVED} is not as in training: {len(self.alarms)} features moved in {len(first['document']['devices'])} "
            f"devices, look {first['document']['opened_window']}; none in wrist=left"
        )
        err.print(Padding(_moved_table(self.alarms[:SHOWN]), (0, 0, 0, 5)))
        left, right = self._share("left", "1"), self._share("right", "1")
        self._say(
            f"accuracy on people 7-10, from the windows: {left:.3f} on the left, {right:.3f} on the right"
        )
        self._require(right < left - CLEAR_DROP, "accuracy on the right wrist is not lower than on the left")

    def retrain(self) -> None:
        """Step 5: the aggregator asks for a better model; it is made, proven, published, tried, and spreads."""
        self._step(
            5, "The aggregator asks for a better model; it is trained, proven, published and rolled out"
        )
        self._wait("a retrain request", lambda: bool(self.view.table("retrains")), timeout_seconds=60)
        self.moments.mark("retrain request")
        self._say(f"it asks because of {self.view.table('retrains')[0]['why']}")
        self._wait("version 2 is made, published and offered", self._offered_next, timeout_seconds=90)
        rollout = self.view.rollout(MODEL)
        assert rollout is not None
        self.versions["2"] = rollout.candidate
        self.moments.mark("version 2 goes to canaries")
        self._say(f"version 2 is proven and signed by the builder key; {CANARIES} canaries try it")
        self._wait_rollout("completed", "2")
        self._wait_serving("2", len(self.devices))
        self.moments.mark("version 2 everywhere")
        self._say(f"the gate passed and the rest followed: {len(self.devices)} devices report version 2")
        rows, otherwise = self.view.shadow(MODEL, rollout.rollout)
        self._require(rows > 0, "no device answered rows in the shadow before it tried version 2")
        self._say(
            f"before it served, version 2 answered {rows} live rows in the shadow of version 1, "
            f"{otherwise / rows:.0%} of them otherwise"
        )
        self._wait(
            "labelled windows of version 2 on the right wrist",
            lambda: self.accuracy("right", "2")[0] >= ENOUGH_LABELLED,
            timeout_seconds=60,
        )
        before, after = self._share("right", "1"), self._share("right", "2")
        self._say(f"accuracy on the right wrist recovers: {before:.3f} before, {after:.3f} after")
        self._require(after > before + CLEAR_DROP, "accuracy on the right wrist did not recover")

    def _offered_next(self) -> bool:
        hooks = self.view.table("retrains")
        if hooks and hooks[0]["state"] == "failed":
            raise StepFailed(f"the retrain hook failed: {hooks[0]['output'][-600:]}")
        rollout = self.view.rollout(MODEL)
        return rollout is not None and rollout.candidate != self.versions["1"]

    def bad_release(self) -> None:
        """Step 6: a far larger forest breaks the latency budget; canaries turn it down; nobody else sees it."""
        self._step(6, "A bad release: a far larger forest, equal to its pipeline but too slow")
        self._wait(
            "version 3, in training since step 1",
            lambda: not self.processes.alive(TRAIN_3),
            timeout_seconds=120,
        )
        self._check_proof("3")
        digest = self._publish("3", role="auto")
        self._offer(digest, [CANARIES, 1.0], why="a bigger model must be better")
        self.moments.mark("version 3 goes to canaries")
        self._wait_rollout("halted", "3")
        self.moments.mark("version 3 halted")
        turned_down = self.view.outcomes(MODEL, digest)
        self._require(bool(turned_down), "no device turned version 3 down")
        device, outcome, reason = turned_down[0]
        self._say(f"{device} {outcome.replace('_', ' ')} it: {reason}")
        self._say(f"the rollout halted after {len(turned_down)} of {CANARIES} canaries had turned it down")
        self._wait_serving("2", len(self.devices))
        served = self.view.totals(Selection(digest=digest))
        self._say(
            f"every device serves version 2; rows that version 3 ever answered: {sum(t.rows for t in served)}"
        )


def evidence_of(incident: dict[str, Any]) -> dict[str, Any]:
    """An incident's evidence by name."""
    return dict(incident["document"]["evidence"])


def _moved_table(incidents: Sequence[dict[str, Any]]) -> Table:
    table = Table("what moved most", "score", "p", "PSI", "at x =", "training ≤ x", "devices ≤ x", box=None)
    for incident in incidents:
        e = evidence_of(incident)
        table.add_row(
            escape(incident["document"]["feature"]),
            f"{e['z']:.1f}",
            f"{e['p']:.4f}",
            f"{e['psi']:.1f}",
            f"{e['cut']:.2f}",
            f"{e['below_before']:.3f}",
            f"{e['below_now']:.3f}",
        )
    return table

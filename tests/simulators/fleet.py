"""A fleet in one process: real agents and the real coordinator on a virtual clock, over a network that misbehaves.

Real are `Agent`, `lifecycle`, the codec, `ingest`, `presence` and `Coordinator`. Modelled are:

- *Time*: a heap of calls. Nothing waits, and one seeded `random.Random` makes every choice, so a seed is a run.
- *Links*: a client's messages reach the broker in the order they were sent, as TCP and MQTT have it. From there on
  they are delayed at random and so reordered (a device's statuses keep their order: MQTT has it for one topic, and
  `presence` needs it); those of QoS 1 may come again late, those of QoS 0 may be lost. When a connection breaks,
  everything on its way to or from that device is lost, the broker notices late (when the device comes back at the
  latest, unless `Faults.late_wills`), and the next connection brings the retained messages.
- *Devices*: the disk holds what the last `Save` wrote (as JSON text), the outbox and the blobs. The power may fail
  before any action the agent asks for; all else is forgotten then, and the device boots after a while.
- *The update child*: a call that takes time and may fail for the network's sake. It believes the signature ``good``,
  holds releases against the floor, and judges a model by its `Kind`: good, slow in the probe, slow only while it
  serves, or crashing as it loads.
- *The centre*: stores windows and events under their key, acknowledges what it stored, and runs the coordinator, whose
  ledger is what its last `Save` wrote. It may die before every transaction and before every publication.

Laws are asserted as things happen (`World.law`), and at the end, when the world has been calm for long enough
(`Fleet.finish`).
"""

from aggregator.config import RolloutConfig
from aggregator.records import Gates
from edge_runtime.contract.ids import DeviceId, Digest
from edge_runtime.contract.release import TrialGate, desired
from tests.simulators.simulated_centre import Centre
from tests.simulators.simulated_device import Device
from tests.simulators.world import CALM, ROWS_PER_WINDOW, Broker, Faults, Kind, World
from tests.support.device import MODEL

ROLLOUTS = RolloutConfig(
    stages=(3, 0.25, 1.0),
    gates=Gates(bake_seconds=3.0),
    trial=TrialGate(predictions=200, seconds=4.0, starts=3),
)


class Fleet(World):
    """The world with its devices, its broker and its centre.

    ``serving`` and ``ever`` tell which devices answer predictions with a model now, and which ever did.
    """

    def __init__(
        self,
        seed: int,
        size: int,
        kinds: dict[Digest, Kind],
        *,
        incumbent: Digest | None = None,
        faults: Faults = CALM,
        rollouts: RolloutConfig = ROLLOUTS,
    ) -> None:
        super().__init__(seed, kinds, faults)
        self.serving: dict[Digest, set[DeviceId]] = {digest: set() for digest in kinds}
        self.ever: dict[Digest, set[DeviceId]] = {digest: set() for digest in kinds}
        self._began: dict[DeviceId, tuple[Digest, str]] = {}
        self.broker = Broker(self)
        names = [DeviceId(f"dev-{k:04d}") for k in range(size)]
        self.centre = Centre(self, self.broker, names, rollouts, incumbent)
        self.devices = {
            name: Device(self, self.broker, name, incumbent, serves=self._serves, stored=self.centre.stored)
            for name in names
        }

    def _serves(self, device: Device, digest: Digest | None) -> None:
        if device.loaded is not None:
            self.serving[device.loaded].discard(device.name)
        device.loaded = digest
        if digest is not None:
            self.serving[digest].add(device.name)
            self.ever[digest].add(device.name)
            if self._began.get(device.name, ("",))[0] != digest:
                self._began[device.name] = (digest, device.saved.rollout)
            self._check_exposure(digest)

    def _check_exposure(self, digest: Digest) -> None:
        """No stage exposes more devices than its cap, those apart that could not be reached when it was cut."""
        r = self.centre.track.rollout
        if r is not None and r.candidate == digest and r.cap >= 0 and r.state != "completed":
            own = (digest, r.rollout)
            exposed = {d for d in self.serving[digest] if self._began[d] == own} - self.centre.latecomers
            self.law(len(exposed) <= r.cap, f"{len(exposed)} devices run a candidate in a stage of {r.cap}")

    def settled(self, device: Device) -> bool:
        """Whether the device runs what the release in force asks of it, or quarantined it, and the centre knows."""
        document, record = self.centre.track.release, self.centre.records.get(device.name)
        if device.agent is None or record is None or not record.online:
            return False
        slots, report = device.agent.slots, record.report(MODEL)
        revision, reached = 0, True
        if document is not None:
            revision, wanted = document.revision, desired(document, device.name)
            held = wanted is not None and dict(slots.quarantine).get(wanted, 0) >= document.attempt
            reached = wanted is None or slots.committed == wanted or held
        told = report is not None and (report.serving, report.revision) == (device.loaded, revision)
        return slots.trial is None and reached and device.loaded == slots.serving and told

    def finish(self, seconds: float = 600.0) -> None:
        """Calms the world; asserts that every device with power converges and that every window was counted once."""
        self.faults = CALM
        here = [device for device in self.devices.values() if not device.off]
        done = self.run(seconds, lambda: not self.centre.busy and all(map(self.settled, here)))
        odd = [f"{d.name}: {d.saved}" for d in here if not self.settled(d)][:2]
        self.law(done, f"devices did not converge to {self.centre.track.release}: {odd}")
        windows, self.window_seconds = self.window_seconds, float("inf")
        self.law(self.run(60.0, lambda: not any(d.outbox for d in here)), "outboxes did not drain")
        self.window_seconds = windows
        stored = self.centre.windows.keys()
        for device in self.devices.values():
            self.law(device.measured <= stored | device.outbox.keys(), "a window was lost")
        rows = sum(row.rows for digest in self.kinds for row in self.centre.totals(digest))
        self.law(rows == ROWS_PER_WINDOW * len(stored), "rows were counted twice")

    def restart_broker(self) -> None:
        """Every connection breaks, and nothing is retained any more."""
        self.broker.retained.clear()
        for device in self.devices.values():
            device.lose_link()
        self.after(1.0, self.centre.reconnect)

"""The topic grammar: who says what where, with which quality of service, and whether it is retained.

Everything stands under ``skiff/1/{fleet}/``. Devices subscribe to exact topics only: a wildcard read of thousands
of retained messages loses some of them without an error.
"""

from dataclasses import dataclass
from typing import Final

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, SourceId

PREFIX: Final = "skiff/1"
PROTOCOLS: Final = ("auto", "5", "3.1.1")
"""Versions of MQTT that can be asked for; all of this works on each."""
MQTT, HTTPS = CARRIERS = ("mqtt", "https")
"""Ways to what the publisher signed."""
CHUNK_BYTES: Final = 64 * 1024
"""Of a chunk, where the signed metadata of the model says nothing else."""
MIN_CHUNK_BYTES: Final = 1024
MAX_CHUNK_BYTES: Final = 256 * 1024
"""What fits into a packet as the device's link takes them, with the topic."""
MAX_BLOB_BYTES: Final = 8 * 1024 * 1024
"""Of a model that is retained on a broker; larger ones are fetched over HTTPS."""


@dataclass(frozen=True, slots=True)
class Delivery:
    """Quality of service and retention of a topic."""

    qos: int
    retain: bool


STATUS: Final = Delivery(1, True)
WINDOW: Final = Delivery(1, False)
EVENT: Final = Delivery(1, False)
LABELS: Final = Delivery(1, False)
ACK: Final = Delivery(0, False)
LABELS_ACK: Final = Delivery(0, False)
COMMAND: Final = Delivery(1, False)
ALARM: Final = Delivery(1, False)
RELEASE: Final = Delivery(1, True)
TRUST: Final = Delivery(1, True)
BLOB: Final = Delivery(1, True)


@dataclass(frozen=True, slots=True)
class Topics:
    """The topics of one fleet."""

    fleet: FleetId

    def _of(self, *parts: str) -> str:
        return "/".join((PREFIX, self.fleet, *parts))

    def status(self, device: DeviceId) -> str:
        """Birth, death and reported state of a device."""
        return self._of("d", device, "status")

    def window(self, device: DeviceId, model: ModelName) -> str:
        """Closed windows of one model on a device."""
        return self._of("d", device, model, "window")

    def event(self, device: DeviceId) -> str:
        """Transitions and incidents of a device."""
        return self._of("d", device, "event")

    def labels(self, source: SourceId) -> str:
        """Labels that a source tells of any device's rows."""
        return self._of("labels", source)

    def labels_ack(self, source: SourceId) -> str:
        """What the aggregator has stored of a source's labels."""
        return self._of("labels", source, "ack")

    def ack(self, device: DeviceId) -> str:
        """What the aggregator has stored of a device."""
        return self._of("d", device, "ack")

    def command(self, device: DeviceId) -> str:
        """Orders to a device."""
        return self._of("d", device, "cmd")

    def alarm(self) -> str:
        """What became of incidents, for whoever wants to know."""
        return self._of("alarm")

    def release(self, cohort: CohortId, model: ModelName) -> str:
        """The signed release of a cohort and a model."""
        return self._of("release", cohort, model)

    def trust(self, root_version: int) -> str:
        """TUF metadata for devices whose trusted root has this version."""
        return self._of("tuf", str(root_version))

    def packed_trust(self, root_version: int) -> str:
        """The same, compressed: a zlib stream (RFC 1950) of the `trust` message. Devices ask for it first."""
        return self._of("tuf", f"{root_version}z")

    def chunk(self, digest: Digest, index: int) -> str:
        """The ``index``-th chunk of a blob: as many bytes as its metadata says, `CHUNK_BYTES` by default."""
        return self._of("blob", digest, str(index))

    def every(self, what: str, share: str = "") -> str:
        """The filter an aggregator subscribes to: ``status``, ``event`` or ``window`` of every device, ``labels`` of
        each source.

        The broker hands each message to one of those who ``share`` a subscription of that name (MQTT 5, section 4.8.2).
        """
        head = f"$share/{share}/" if share else ""
        if what == "window":
            return head + self._of("d", "+", "+", "window")
        if what in ("status", "event"):
            return head + self._of("d", "+", what)
        if what == "labels":
            return head + self._of("labels", "+")
        raise ContractError(f"no such family of topics: {what!r}")

    def sender(self, topic: str) -> tuple[DeviceId, str]:
        """The device that owns ``topic`` and the last word of it (``status``, ``window``, ``event``).

        Raises `ContractError` when ``topic`` is not one a device of this fleet writes.
        """
        head = self._of("d", "")
        match topic.removeprefix(head).split("/"):
            case [device, "status" | "event" as what] if topic.startswith(head):
                return ids.device_id(device), what
            case [device, model, "window" as what] if topic.startswith(head):
                ids.model_name(model)
                return ids.device_id(device), what
        raise ContractError(f"topic {topic!r:.200} is not one a device of fleet {self.fleet} writes")

    def source(self, topic: str) -> SourceId | None:
        """The source whose labels ``topic`` is for; None when it is no topic of labels of this fleet.

        Raises `ContractError` when the source's name is none.
        """
        name = topic.removeprefix(self._of("labels", ""))
        return None if name == topic or "/" in name else ids.source_id(name)


def chunk_count(length: int, chunk_bytes: int = CHUNK_BYTES) -> int:
    """How many chunks a blob of ``length`` bytes has; an empty blob has none."""
    return -(-length // chunk_bytes)

"""What the update child is told, and what it says of a model it has tried."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.carriers.https import Web
from edge_runtime.contract import codec, ids, topics
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName
from edge_runtime.contract.trust import repository_url
from edge_runtime.core.budget import Budget
from edge_runtime.mqtt.broker import Broker


class Refusal(SkiffError):
    """Why the job ends without an update.

    ``retry`` tells whether the same job may do better later; ``digest`` is the model it is held against, if any: with
    ``retry``, only if it happens again and again.
    ``stage`` is where the job stood, if whoever raises it knows better than the job.
    """

    def __init__(self, reason: str, *, retry: bool, digest: Digest | None = None, stage: str = "") -> None:
        super().__init__(reason)
        self.retry = retry
        self.digest = digest
        self.stage = stage


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """What the daemon asks. Everything is its own state but ``release``, which nobody has verified yet.

    ``floor`` is the highest revision it accepted from the cohort, ``have`` the models that were committed here. ``web``
    is the publisher's repository on a web server, if there is one; ``prefer`` says which way is tried first, ``mqtt``
    or ``https``. ``load_peak_bytes`` limits resident memory while a model is loaded; 0 means no limit.
    """

    state_dir: Path
    fleet: FleetId
    cohort: CohortId
    model: ModelName
    device: DeviceId
    broker: Broker
    web: Web | None
    prefer: str
    max_chunk_bytes: int
    release: bytes
    root: Path
    floor: int
    serving: Digest | None
    have: frozenset[Digest]
    quarantine: Mapping[Digest, int]
    budget: Budget
    load_peak_bytes: int
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
            web=_read_web(f.section("web", {})),
            prefer=f.text("prefer", topics.MQTT, choices=topics.CARRIERS),
            max_chunk_bytes=f.integer(
                "max_chunk_bytes",
                topics.MAX_CHUNK_BYTES,
                low=topics.MIN_CHUNK_BYTES,
                high=topics.MAX_CHUNK_BYTES,
            ),
            release=bytes.fromhex(f.text("release", max_length=2 * codec.MAX_MESSAGE_BYTES)),
            root=Path(f.text("root", max_length=4096)),
            floor=f.integer("floor"),
            serving=ids.digest(serving) if serving else None,
            have=frozenset(ids.digest(text) for text in f.texts("have")),
            quarantine={ids.digest(text): attempt for text, attempt in f.counts("quarantine")},
            budget=read_budget(f.section("budgets")),
            load_peak_bytes=f.integer("load_peak_bytes", 0),
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


def _read_web(f: Fields) -> Web | None:
    url = repository_url(f.text("url", ""))
    if not url:
        return None
    return Web(
        url=url,
        ca=f.text("ca", "", max_length=4096),
        certificate=f.text("certificate", "", max_length=4096),
        key=f.text("key", "", max_length=4096),
    )


def read_budget(f: Fields) -> Budget:
    """The limits of a model from a table of them; raises `ContractError`."""
    return Budget(predict_p99_ns=f.integer("predict_p99_ns", 0), rss_bytes=f.integer("rss_bytes", 0))


@dataclass(frozen=True, slots=True, kw_only=True)
class Probed:
    """What the probe measured on this device.

    ``rss_bytes`` is what a process with this model alone has resident, ``peak_rss_bytes`` what it had at most, while it
    loaded. ``incumbent_p99_ns`` is what the model that serves
    took meanwhile, in turns with this one; 0 when there was none to compare with, and ``incumbent`` says why.
    """

    rss_bytes: int
    peak_rss_bytes: int
    predict_p50_ns: int
    predict_p99_ns: int
    runs: int
    golden_rows: int
    incumbent_p99_ns: int
    incumbent: str

    @classmethod
    def read(cls, answer: Fields) -> "Probed":
        """Reads the probe's answer; raises `ContractError`."""
        return cls(
            rss_bytes=answer.integer("rss_bytes"),
            peak_rss_bytes=answer.integer("peak_rss_bytes"),
            predict_p50_ns=answer.integer("predict_p50_ns"),
            predict_p99_ns=answer.integer("predict_p99_ns"),
            runs=answer.integer("runs"),
            golden_rows=answer.integer("golden_rows"),
            incumbent_p99_ns=answer.integer("incumbent_p99_ns", 0),
            incumbent=answer.text("incumbent", "", max_length=4096),
        )

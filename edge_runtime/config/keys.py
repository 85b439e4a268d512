"""Every key of the device's configuration, declared once.

`read` and the JSON Schema for editors (`config.schema`) are both made from `SECTIONS` and `NEEDS`, so that neither
can know a key, a range or a choice that the other does not.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import REQUIRED, Fields
from edge_runtime.contract.topics import CARRIERS, MAX_CHUNK_BYTES, MIN_CHUNK_BYTES, PROTOCOLS
from edge_runtime.contract.trust import REPOSITORY_URL, repository_url

Value = str | int | float | bool
Kind = Literal["text", "path", "integer", "number", "flag", "flag_or_auto"]

MAX_TEXT: Final = 1024
AUTO: Final = "auto"
BASE_WHY: Final = (
    "A file with the hardware class, from this file's folder; tables here override it key by key."
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key: what it may hold, what holds without it, and why it is there. No ``default``: it must be given.

    ``low`` and ``high`` bound numbers, ends included. ``name_of`` says what the text names, ``check`` validates it
    and raises `ContractError`; both come with ``pattern``, which says the same to an editor.
    """

    name: str
    kind: Kind
    why: str
    default: Value | None = None
    low: float = 0
    high: float = 0
    unit: str = ""
    choices: tuple[str, ...] = ()
    pattern: str = ""
    check: Callable[[object], str] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Section:
    """A table; ``name`` is dotted. ``free``: any names with texts instead of ``keys``."""

    name: str
    why: str
    keys: tuple[Key, ...] = ()
    required: bool = False
    free: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """In ``section``, ``needed`` is needed when ``key`` is ``value``, or not empty where ``value`` is empty."""

    section: str
    key: str
    value: str
    needed: str
    why: str


def _name(name: str, check: Callable[[object], str], why: str, default: str | None = None) -> Key:
    return Key(name=name, kind="text", default=default, pattern=ids.NAME.pattern, check=check, why=why)


def _path(name: str, why: str, default: str | None = "") -> Key:
    return Key(name=name, kind="path", default=default, why=why)


def _text(name: str, default: str, why: str) -> Key:
    return Key(name=name, kind="text", default=default, why=why)


def _choice(name: str, choices: tuple[str, ...], why: str) -> Key:
    """The first choice is the default."""
    return Key(name=name, kind="text", default=choices[0], choices=choices, why=why)


def _flag(name: str, default: bool, why: str) -> Key:  # noqa: FBT001 (like its siblings)
    return Key(name=name, kind="flag", default=default, why=why)


def _integer(name: str, default: int, low: int, high: int, unit: str, why: str) -> Key:  # noqa: PLR0917 (a row of the table)
    return Key(name=name, kind="integer", default=default, low=low, high=high, unit=unit, why=why)


def _number(name: str, default: float, low: float, high: float, unit: str, why: str) -> Key:  # noqa: PLR0917 (a row of the table)
    return Key(name=name, kind="number", default=default, low=low, high=high, unit=unit, why=why)


_HOST: Final = (
    _text("host", "localhost", "Name or address of the broker."),
    _integer("port", 1883, 1, 65535, "", "Its TCP port; brokers speak TLS on 8883 by custom."),
    _text("username", "", "Who we are to a broker with passwords; the password comes from the environment."),
)

SECTIONS: Final = (
    Section(
        name="device",
        required=True,
        why="Which device this is, and where it keeps its state.",
        keys=(
            _name("id", ids.device_id, "The device's name: unique in the fleet, and its MQTT client id."),
            _name("fleet", ids.fleet_id, "The fleet, which is the root of every topic."),
            _name("cohort", ids.cohort_id, "Devices of one cohort get the same releases.", "main"),
            _path("state_dir", "Models, trust and outbox; must be on a disk that survives power loss.", None),
            _path("status_socket", 'Where `skiffd --status` asks; "" is status.sock in state_dir.'),
            Key(
                name="clock_synced",
                kind="flag_or_auto",
                default=AUTO,
                why="Whether windows may be aligned to UTC: as told, or as the kernel says (adjtimex: some NTP "
                "client disciplines the clock).",
            ),
        ),
    ),
    Section(
        name="device.attributes",
        free=True,
        why="What sets this device apart (site, hardware); drift is judged by them.",
    ),
    Section(
        name="broker",
        required=True,
        why="The fleet's MQTT broker. The password is SKIFF_BROKER_PASSWORD in the environment.",
        keys=(
            *_HOST,
            _choice("protocol", PROTOCOLS, "MQTT version: 5 if the broker speaks it, or the one named."),
            _integer(
                "keepalive_seconds", 30, 5, 3600, "s",
                "A dead link is noticed after 1.5 times this; each ping wakes the radio.",
            ),
        ),
    ),
    Section(
        name="broker.tls",
        why="TLS 1.2 or newer with host name check, spoken when `ca` is given.",
        keys=(
            _path("ca", "PEM file with the authority that signed the broker's certificate."),
            _path("certificate", "PEM file with this device's certificate; its common name is the device id."),
            _path("key", "PEM file with the key of that certificate."),
        ),
    ),
    Section(
        name="model",
        required=True,
        why="What is served, and whom to believe about it.",
        keys=(
            _name("name", ids.model_name, "The model family whose releases this device follows."),
            _path("trust_root", "The pinned TUF root (1.root.json) that the device was provisioned with.", None),
            _integer(
                "threads", 1, 1, 64, "",
                "Threads of one inference: for one row at a time the first is the fastest.",
            ),
            _flag("arena", False, "ONNX Runtime's memory arena: a little faster for batches, never gives memory back."),
            _number(
                "run_limit_seconds", 0.0, 0.0, 3600.0, "s",
                "A run that takes longer is ended and refused; 0: none, but 30 s for a model on trial.",
            ),
            _integer(
                "max_batch", 4096, 1, 1_000_000, "rows",
                "Larger batches are run in parts of this size, which bounds the memory of a run.",
            ),
        ),
    ),
    Section(
        name="window",
        why="How rows are summed up before they leave the device.",
        keys=(
            _number("seconds", 300.0, 0.1, 86400.0, "s", "Period of a window; longer ones cost less traffic."),
            _integer(
                "min_rows", 30, 1, 2**31 - 1, "rows",
                "A window with fewer stays open: a histogram of one row is that row.",
            ),
            _number(
                "jitter_seconds", -1.0, -1.0, 3600.0, "s",
                "Windows are published this much later at most, each device at its own moment; "
                "below 0: a tenth of the period, 30 s at most.",
            ),
        ),
    ),
    Section(
        name="budgets",
        why="What the device may spend; 0 sets no limit. Benchmarks and `skiffd --check` hold against them.",
        keys=(
            _number("predict_p99_us", 0.0, 0.0, 1e9, "us", "CPU time of one row, 99th percentile."),
            _number("rss_soft_mb", 0.0, 0.0, 1e6, "MB", "Resident memory of the daemon above which it says so."),
            _number("rss_mb", 0.0, 0.0, 1e6, "MB", "Resident memory of the daemon above which it acts."),
            _choice(
                "on_hard_limit", ("shed", "report", "smaller_batch", "roll_back"),
                "What it then does: refuse rows, only say so, run smaller batches, or give up the model on trial. "
                "Unless it only says so such a model is given up first; where there is none, `roll_back` refuses rows.",
            ),
            _number("load_peak_mb", 0.0, 0.0, 1e6, "MB", "Resident peak while a model is loaded or swapped."),
            _number("update_mb", 0.0, 0.0, 1e6, "MB", "Resident peak of the update child, which lives for one update."),
            _integer("window_bytes", 0, 0, 1 << 20, "bytes", "Size of one window's message."),
            _number("start_seconds", 0.0, 0.0, 3600.0, "s", "From the start of the process to its first prediction."),
            _number("temperature_c", 0.0, 0.0, 150.0, "degrees C", "Of the hottest zone; a Pi slows down at 80."),
        ),
    ),
    Section(
        name="update",
        why="Where models come from besides the broker, and limits of the child that fetches, verifies and tries them.",
        keys=(
            Key(
                name="url", kind="text", default="", pattern=f"(?:{REPOSITORY_URL})?", check=repository_url,
                why="https address of a copy of the publisher's metadata/ and targets/, for models above 8 MiB and "
                'where the broker has none; the client certificate is that of [broker.tls]. "": the broker alone.',
            ),
            _path("ca", 'PEM file with the authority of that web server; "": those that the system trusts.'),
            _choice("prefer", CARRIERS, "Which way is tried first for what both can bring."),
            _integer(
                "max_chunk_kib", MAX_CHUNK_BYTES >> 10, MIN_CHUNK_BYTES >> 10, MAX_CHUNK_BYTES >> 10, "KiB",
                "Models in larger chunks are not taken from the broker; four are held in memory at a time.",
            ),
            _number(
                "probe_address_space_mb", 2048.0, 64.0, 1e6, "MB",
                "Address space of the process that tries a model first; a graph that wants more is refused.",
            ),
            _number("deadline_seconds", 600.0, 1.0, 604800.0, "s", "An update that takes longer starts again later."),
            _number(
                "shadow_cpu_share", 0.1, 0.0, 1.0, "",
                "Of one CPU, for a candidate that answers rows unheard before its trial; with 0 there is no such time.",
            ),
        ),
    ),
    Section(
        name="outbox",
        why="Windows that wait for the aggregator; when it is full, old ones are merged and totals stay exact.",
        keys=(
            _number("max_kb", 64.0, 4.0, 1e6, "KiB", "Room for closed windows; 64 hold a month offline."),
            _number("max_mb", 0.0, 0.0, 1e4, "MB", "The same limit for devices with more room; counts when above 0."),
        ),
    ),
    Section(
        name="source",
        why="Where rows come from, if not from calls in Python.",
        keys=(
            _choice(
                "kind", ("none", "replay", "stdio", "unix", "mqtt"),
                "Nothing, a recorded file, lines of JSON on stdin or on a Unix socket, or a local MQTT topic.",
            ),
            _path("path", "replay: the .npz file."),
            _number("rows_per_second", 5.0, 0.01, 1e6, "1/s", "replay: how fast."),
            _integer("seed", 0, 0, 2**63 - 1, "", "replay: order of the recordings."),
            _path("socket", "unix: path of the socket; the kernel allows 107 bytes."),
            Key(
                name="socket_mode", kind="text", default="0660", pattern="0?[0-7]{3}",
                why="unix: who may connect, as in chmod; whoever connects may ask for predictions.",
            ),
            _integer("max_clients", 8, 1, 1024, "", "unix: connections at a time; each has a buffer of one line."),
            _integer("max_line_kb", 256, 1, 16384, "KiB", "stdio, unix, mqtt: the longest request that is read."),
            _text("topic_in", "", "mqtt: topic of the rows."),
            _text("topic_out", "", 'mqtt: topic of the answers; "": nobody is told.'),
        ),
    ),
    Section(
        name="source.broker",
        why="mqtt: the local broker, without TLS. The password is SKIFF_SOURCE_PASSWORD in the environment.",
        keys=_HOST,
    ),
)  # fmt: skip
"""In this order the tables are read, and a table stands after the one it is in."""

_PAIR: Final = "belong together: give both or neither"
NEEDS: Final = (
    Need(section="broker.tls", key="certificate", value="", needed="key", why=f"and certificate {_PAIR}"),
    Need(section="broker.tls", key="key", value="", needed="certificate", why=f"and key {_PAIR}"),
    Need(section="update", key="prefer", value="https", needed="url", why="is missing: prefer names it"),
    Need(
        section="source",
        key="kind",
        value="replay",
        needed="path",
        why="is missing: a replay needs the .npz file to replay",
    ),
    Need(
        section="source", key="kind", value="unix", needed="socket", why="is missing: clients need its path"
    ),
    Need(
        section="source",
        key="kind",
        value="mqtt",
        needed="topic_in",
        why="is missing: rows come from a topic",
    ),
)


@dataclass(frozen=True, slots=True)
class Document:
    """What a file says, defaults filled in: values by dotted name, and the free tables as sorted pairs."""

    values: Mapping[str, Value]
    pairs: Mapping[str, tuple[tuple[str, str], ...]]

    def text(self, name: str) -> str:
        """A text or a path as it was written."""
        value = self.values[name]
        assert isinstance(value, str), name
        return value

    def integer(self, name: str) -> int:
        """A whole number."""
        value = self.values[name]
        assert isinstance(value, int), name
        return value

    def number(self, name: str) -> float:
        """A number."""
        value = self.values[name]
        assert isinstance(value, int | float), name
        return float(value)


def read(document: object, where: str) -> Document:
    """Checks a whole document; raises `ConfigError` naming ``where``, the key and what is allowed."""
    readers = {"": Fields(document, where, ConfigError)}
    values: dict[str, Value] = {}
    pairs: dict[str, tuple[tuple[str, str], ...]] = {}
    for section in SECTIONS:
        parent, _, name = section.name.rpartition(".")
        if section.free:
            pairs[section.name] = readers[parent].pairs(name, {})
            continue
        fields = readers[parent].section(name, REQUIRED if section.required else {})
        readers[section.name] = fields
        for key in section.keys:
            values[f"{section.name}.{key.name}"] = _read_key(fields, key)
    for need in NEEDS:
        found, wanted = values[f"{need.section}.{need.key}"], values[f"{need.section}.{need.needed}"]
        if (found == need.value if need.value else found != "") and wanted == "":
            raise readers[need.section].fail(need.needed, need.why)
    for fields in reversed(readers.values()):
        fields.finish()
    return Document(values, pairs)


def _read_key(fields: Fields, key: Key) -> Value:
    default: Any = REQUIRED if key.default is None else key.default
    match key.kind:
        case "text" | "path":
            return _read_text(fields, key, default)
        case "integer":
            return fields.integer(key.name, default, low=int(key.low), high=int(key.high))
        case "number":
            return fields.number(key.name, default, low=key.low, high=key.high)
        case "flag":
            return fields.flag(key.name, default)
        case "flag_or_auto":
            try:
                return fields.flag(key.name, default)
            except ConfigError as e:
                try:
                    return fields.text(key.name, default, choices=(AUTO,))
                except ConfigError:
                    raise fields.fail(key.name, f'expected true or false, or "{AUTO}"') from e


def _read_text(fields: Fields, key: Key, default: Any) -> str:
    text = fields.text(key.name, default, max_length=MAX_TEXT, choices=key.choices or None)
    if key.check is not None:
        try:
            return key.check(text)
        except ContractError as e:
            raise fields.fail(key.name, str(e)) from e
    if key.pattern and not re.fullmatch(key.pattern, text):
        raise fields.fail(key.name, f"{text!r} does not match {key.pattern}")
    return text

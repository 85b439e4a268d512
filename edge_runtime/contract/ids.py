"""Names that passed validation. A value of one of these types is safe in a topic, a path and a log line."""

import hashlib
import re
from typing import NewType

from edge_runtime.contract.errors import ContractError

FleetId = NewType("FleetId", str)
DeviceId = NewType("DeviceId", str)
CohortId = NewType("CohortId", str)
ModelName = NewType("ModelName", str)
RolloutId = NewType("RolloutId", str)
SessionId = NewType("SessionId", str)
SourceId = NewType("SourceId", str)
LayoutId = NewType("LayoutId", str)
Digest = NewType("Digest", str)

NAME = re.compile(r"[a-z0-9-]{1,64}")
SESSION = re.compile(r"[0-9a-f]{16}")
LAYOUT = re.compile(r"[0-9a-f]{16}")
DIGEST = re.compile(r"[0-9a-f]{64}")
VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")


def _checked(value: object, pattern: re.Pattern[str], what: str) -> str:
    if not isinstance(value, str) or not pattern.fullmatch(value):
        raise ContractError(f"{value!r} is not a {what}: it must match {pattern.pattern}")
    return value


def fleet_id(value: object) -> FleetId:
    """Validates a fleet's name; raises `ContractError`."""
    return FleetId(_checked(value, NAME, "fleet name"))


def device_id(value: object) -> DeviceId:
    """Validates a device's name; raises `ContractError`. Rules out ``+``, ``#`` and ``/`` (CVE-2017-7650)."""
    return DeviceId(_checked(value, NAME, "device name"))


def cohort_id(value: object) -> CohortId:
    """Validates a cohort's name; raises `ContractError`."""
    return CohortId(_checked(value, NAME, "cohort name"))


def model_name(value: object) -> ModelName:
    """Validates a model family's name; raises `ContractError`."""
    return ModelName(_checked(value, NAME, "model name"))


def rollout_id(value: object) -> RolloutId:
    """Validates a rollout's name; raises `ContractError`."""
    return RolloutId(_checked(value, NAME, "rollout name"))


def session_id(value: object) -> SessionId:
    """Validates a session: 16 hexadecimal digits, drawn at each start of a daemon; raises `ContractError`."""
    return SessionId(_checked(value, SESSION, "session"))


def source_id(value: object) -> SourceId:
    """Validates the name of a source of labels; raises `ContractError`."""
    return SourceId(_checked(value, NAME, "source's name"))


def layout_id(value: object) -> LayoutId:
    """Validates a cell layout's id: 16 hexadecimal digits; raises `ContractError`."""
    return LayoutId(_checked(value, LAYOUT, "layout id"))


def digest(value: object) -> Digest:
    """Validates a SHA-256 digest: 64 lower-case hexadecimal digits; raises `ContractError`."""
    return Digest(_checked(value, DIGEST, "SHA-256 digest"))


def digest_of(data: bytes | bytearray | memoryview) -> Digest:
    """The SHA-256 digest of ``data``."""
    return Digest(hashlib.sha256(data).hexdigest())

"""What the publisher writes into TUF metadata and a device looks for there: names, and a table of our own.

Signed TUF metadata may carry fields of one's own. Ours stand under ``skiff``: in targets metadata
``{"revoked": [digest, …]}``, in timestamp metadata ``{"signed": seconds since 1970, "root": version}``.
"""

from collections.abc import Mapping
from typing import Any, Final

from edge_runtime.contract import ids
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, ModelName

DIRECTOR: Final = "director"
"""The delegated role whose keys sign releases; it vouches for no target."""
TABLE: Final = "skiff"
_YEAR_9999: Final = 253_402_300_799


def auto_role(model: ModelName) -> str:
    """The delegated role that vouches for the automatically published models of a family."""
    return f"auto-{model}"


def auto_pattern(model: ModelName) -> str:
    """The target paths `auto_role` may vouch for."""
    return f"auto/{model}/*"


def auto_path(model: ModelName, digest: Digest) -> str:
    """The target path of an automatically published model."""
    return f"auto/{model}/{digest}.onnx"


def approved_path(model: ModelName, digest: Digest) -> str:
    """The target path of a model that the targets keys approved."""
    return f"models/{model}/{digest}.onnx"


def read_revoked(fields: Mapping[str, Any]) -> frozenset[Digest]:
    """The revoked digests among a targets role's own ``fields``; raises `ContractError`."""
    table = Fields(fields.get(TABLE, {}), "targets.skiff")
    return frozenset(ids.digest(text) for text in table.texts("revoked", ()))


def read_signed_seconds(fields: Mapping[str, Any]) -> int:
    """When a timestamp role was signed, in seconds since 1970, among its own ``fields``; raises `ContractError`."""
    return Fields(fields.get(TABLE, {}), "timestamp.skiff").integer("signed", high=_YEAR_9999)


def read_root_version(fields: Mapping[str, Any]) -> int:
    """The version of the root that a timestamp role was signed under; raises `ContractError`."""
    return Fields(fields.get(TABLE, {}), "timestamp.skiff").integer("root", low=1)

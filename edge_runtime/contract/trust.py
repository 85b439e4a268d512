"""What the publisher writes into TUF metadata and a device looks for there: names, and a table of our own.

Signed TUF metadata may carry fields of one's own. Ours stand under ``skiff``: in targets metadata
``{"revoked": [digest, …]}``, in timestamp metadata ``{"signed": seconds since 1970, "root": version}``. What a model is
and costs stands in the ``custom`` table of its target, see `Target`.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from edge_runtime.contract import ids, topics
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, ModelName
from edge_runtime.contract.manifest import Budgets

DIRECTOR: Final = "director"
"""The delegated role whose keys sign releases; it vouches for no target."""
TABLE: Final = "skiff"
_YEAR_9999: Final = 253_402_300_799

METADATA_FOLDER: Final = "metadata"
TARGETS_FOLDER: Final = "targets"
"""Of a repository: what a web server that offers it has below its address."""
_NAME: Final = r"[A-Za-z0-9._~-]+"
_REST: Final = rf"(?::[0-9]{{1,5}})?(?:/{_NAME})*/?"
REPOSITORY_URL: Final = rf"(?:https://(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\])|http://(?:localhost|127(?:\.[0-9]{{1,3}}){{3}}|\[::1\])){_REST}"
"""Addresses of a repository, as a regular expression: https, or http to this very machine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A model that the publisher vouches for: where it is below ``targets/``, and what is known before it is fetched.

    Sizes are in bytes. ``manifest`` is the digest of the manifest's text in the artifact, None in metadata from before
    it was written there; then ``budgets`` are unknown too, which is no limit. ``chunk_bytes`` is the size of its chunks
    on the broker, the last one excepted.
    """

    digest: Digest
    path: str
    length: int
    chunk_bytes: int = topics.CHUNK_BYTES
    manifest: Digest | None = None
    budgets: Budgets = field(default_factory=Budgets)

    @property
    def chunks(self) -> int:
        """How many chunks it has on a broker."""
        return topics.chunk_count(self.length, self.chunk_bytes)


def describe(manifest: Digest, budgets: Budgets, chunk_bytes: int) -> dict[str, Any]:
    """The part of a target's ``custom`` table that `read_target` reads."""
    return {
        "manifest": manifest,
        "budgets": {"predict_p99_ns": budgets.predict_p99_ns, "rss_bytes": budgets.rss_bytes},
        "chunk_bytes": chunk_bytes,
    }


def read_target(digest: Digest, path: str, length: int, custom: object) -> Target:
    """A target from its signed ``custom`` table, None where it has none; raises `ContractError`."""
    f = Fields(custom or {}, f"{path}.custom")
    manifest = f.text("manifest", "")
    budgets = f.section("budgets", {})
    return Target(
        digest=digest,
        path=path,
        length=length,
        chunk_bytes=f.integer(
            "chunk_bytes", topics.CHUNK_BYTES, low=topics.MIN_CHUNK_BYTES, high=topics.MAX_CHUNK_BYTES
        ),
        manifest=ids.digest(manifest) if manifest else None,
        budgets=Budgets(
            predict_p99_ns=budgets.integer("predict_p99_ns", 0), rss_bytes=budgets.integer("rss_bytes", 0)
        ),
    )


def repository_url(value: object) -> str:
    """Validates the address of a repository, "" for none; raises `ContractError`.

    Models and metadata are signed, so that plain http could not change them; but whoever is on the way would see which
    device fetches what, and hold it back at will. It is allowed to this machine only, where a proxy or a cache may be.
    """
    if value == "" or (isinstance(value, str) and re.fullmatch(REPOSITORY_URL, value)):
        return str(value)
    raise ContractError(
        f"{value!r:.200} is not the address of a repository: https://host/path/, without user, query or fragment; "
        "http:// is for localhost only"
    )


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

"""State folder, trust root, sockets and recorded files."""

import json
import os
import tempfile
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from edge_runtime.adapters.unix_socket import MAX_PATH_BYTES
from edge_runtime.check.finding import Finding, error, ok, warning
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.codec import MAX_MESSAGE_BYTES

FREE_BYTES: Final = 256_000_000
"""Three models of 78 MB: the one that serves, the one before, the one that arrives."""
VOLATILE: Final = frozenset({"tmpfs", "ramfs", "overlay"})
PLACEHOLDER: Final = "change-me"
ROLES: Final = ("root", "timestamp", "snapshot", "targets")


def check_names(config: DaemonConfig) -> Iterator[Finding]:
    """Placeholders of the shipped files that nobody replaced."""
    names = {"device.id": config.device, "device.fleet": config.fleet, "model.name": config.model}
    left = [key for key, name in names.items() if name == PLACEHOLDER]
    for key in left:
        yield error(key, f"it still says {PLACEHOLDER!r}", "give the name of your own")
    if not left:
        yield ok(
            "device.id",
            f"{config.device} of fleet {config.fleet}, cohort {config.cohort}, model {config.model}",
        )


def check_state_dir(config: DaemonConfig, mounts: Path = Path("/proc/self/mounts")) -> Iterator[Finding]:
    """Whether what is written there stays there. Tries it with a file of its own, and creates no folder."""
    folder, where = config.state_dir, "device.state_dir"
    if not folder.exists():
        parent = next(above for above in folder.parents if above.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            yield error(
                where, f"{folder} is not there and {parent} is not writable", "create it for this user"
            )
            return
        yield ok(where, f"{folder} will be created")
        folder = parent
    elif not folder.is_dir():
        yield error(where, f"{folder} is no folder", "name another one")
        return
    else:
        problem = _try_to_write(folder)
        if problem:
            yield error(where, f"{folder}: {problem}", "mount it writable, and let the user of skiffd own it")
            return
        yield ok(where, f"{folder} keeps what is written")
    kind = _filesystem(folder, mounts)
    if kind in VOLATILE:
        yield warning(
            where,
            f"{folder} is on {kind}, which a restart of the machine or container empties",
            "use a disk or a volume: models and unacknowledged windows would be lost",
        )
    usage = os.statvfs(folder)
    free = usage.f_bavail * usage.f_frsize
    if free < config.outbox_bytes + (16 << 20):
        yield error(where, f"{free / 1e6:.0f} MB are free: not enough for one model", "free some space")
    elif free < FREE_BYTES:
        yield warning(
            where,
            f"{free / 1e6:.0f} MB are free",
            "three models have to fit: the last, the next and this one",
        )


def _try_to_write(folder: Path) -> str:
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".check-") as stream:
            stream.write(b"skiff")
            stream.flush()
            os.fsync(stream.fileno())
    except OSError as e:
        return f"cannot be written ({e.strerror})"
    return ""


def _filesystem(folder: Path, mounts: Path) -> str:
    """The type of the file system that ``folder`` is on; "" where the kernel does not show it."""
    best, kind = -1, ""
    try:
        lines = mounts.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    for line in lines:  # device mount-point type options dump pass; spaces are written \040
        _, point, found, *_ = line.split(" ")
        path = Path(point.replace("\\040", " "))
        # Of two mounts on one point the later one counts.
        if folder.resolve().is_relative_to(path) and len(path.parts) >= best:
            best, kind = len(path.parts), found
    return kind


def check_trust_root(config: DaemonConfig, now_seconds: float) -> Iterator[Finding]:
    """Whether the pinned root is one. Its signatures are the update child's business; it is trusted as provisioned."""
    path, where = config.trust_root, "model.trust_root"
    advice = "copy 1.root.json of your repository to it"
    try:
        with path.open("rb") as stream:
            document = json.loads(stream.read(MAX_MESSAGE_BYTES))
        signed = document["signed"]
        problem = _root_problem(signed, document["signatures"])
        version = signed.get("version")
        expires = datetime.fromisoformat(str(signed.get("expires")))
    except OSError as e:
        yield error(where, f"{path} cannot be read ({e.strerror})", advice)
        return
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        yield error(where, f"{path} is no TUF root ({type(e).__name__}: {e})", advice)
        return
    if problem:
        yield error(where, f"{path} {problem}", advice)
    elif expires <= datetime.fromtimestamp(now_seconds, UTC):
        yield warning(
            where,
            f"{path} (version {version}) expired on {expires:%Y-%m-%d}",
            "it works as long as the fleet publishes a newer root that it leads to; provision that one",
        )
    else:
        yield ok(where, f"{path} is version {version}, valid until {expires:%Y-%m-%d}")


def _root_problem(signed: dict[str, Any], signatures: list[dict[str, Any]]) -> str:
    if signed.get("_type") != "root":
        return f"is TUF metadata of type {signed.get('_type')!r}, not a root"
    keys, roles = signed["keys"], signed["roles"]
    for name in ROLES:
        role = roles[name]
        known = set(role["keyids"]) & set(keys)
        if not 1 <= role["threshold"] <= len(known):
            return f"asks for {role['threshold']} signatures of {name} and has {len(known)} keys"
    signers = {entry["keyid"] for entry in signatures if entry["sig"]} & set(roles["root"]["keyids"])
    if len(signers) < roles["root"]["threshold"]:
        return f"is signed by {len(signers)} of {roles['root']['threshold']} root keys"
    return ""


def check_source(config: DaemonConfig) -> Iterator[Finding]:
    """Where rows come from, as far as it can be seen without taking any; a local broker is `broker`'s business."""
    source = config.source
    if source.kind == "replay":
        try:
            with source.path.open("rb") as stream:
                magic = stream.read(4)
        except OSError as e:
            yield error(
                "source.path", f"{source.path} cannot be read ({e.strerror})", "name a recorded .npz file"
            )
        else:
            if magic[:2] != b"PK":
                yield error("source.path", f"{source.path} is no .npz file", "write it with numpy.savez")
            else:
                yield ok("source.path", f"{source.path} can be read")
    if source.kind == "unix":
        yield _check_socket("source.socket", source.socket, no_place=error)
    # Without a place in a folder, the daemon answers --status under an abstract name instead.
    if config.status_socket.parent == config.state_dir and not config.state_dir.exists():
        yield ok("device.status_socket", f"{config.status_socket} can be made")  # it comes with the folder
    else:
        yield _check_socket("device.status_socket", config.status_socket, no_place=warning)


def _check_socket(where: str, path: Path, *, no_place: Callable[[str, str, str], Finding]) -> Finding:
    length = len(os.fsencode(path))
    if length > MAX_PATH_BYTES:
        return no_place(
            where, f"{path} has {length} bytes and the kernel allows {MAX_PATH_BYTES}", "shorten it"
        )
    if not path.parent.is_dir():
        return no_place(
            where, f"the folder {path.parent} is not there", "create it, or name a RuntimeDirectory"
        )
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return no_place(where, f"{path.parent} is not writable", "let the user of skiffd own it")
    if path.exists() and not path.is_socket():
        return error(where, f"{path} is there and no socket", "remove it, or name another path")
    return ok(where, f"{path} can be made")

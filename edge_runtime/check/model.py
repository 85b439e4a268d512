"""Whether ONNX Runtime runs here and the installed model gives its known answer, tried in a process of its own.

A wheel for another processor ends its process with SIGILL, a damaged file may do the same: the check survives both.
"""

import json
from collections.abc import Iterator
from typing import Final

from edge_runtime.adapters import sandbox
from edge_runtime.adapters.slots import Slots
from edge_runtime.check.finding import Finding, error, ok, warning
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.core import lifecycle

TRY_SECONDS: Final = 120.0
_TRIAL: Final = "edge_runtime.check.trial"


def check_model(config: DaemonConfig) -> Iterator[Finding]:
    """Tries the engine, with the model that this device has committed if it has one."""
    digest, problem = _committed(config)
    if problem:
        yield error(
            "device.state_dir", problem, "restore the folder, or empty it: the device fetches its model again"
        )
    task = {"path": "", "digest": "", "threads": config.threads}
    if digest:
        task |= {"path": str(config.state_dir / "blobs" / f"{digest}.onnx"), "digest": digest}
    try:
        ended = sandbox.run(_TRIAL, task, timeout_seconds=TRY_SECONDS)
        answer = Fields(json.loads(ended.answer), "the model's trial") if ended.code == 0 else None
    except (TimeoutError, ValueError) as e:
        yield error("model", str(e), "see whether the machine is overloaded, and install skiff again")
        return
    if answer is None:
        yield error(
            "model",
            f"the process that tries it {ended.how}: {ended.words}",
            "install the packages of requirements/device.txt for this processor again",
        )
        return
    yield from _judge(config, digest, answer)


def _judge(config: DaemonConfig, digest: str, answer: Fields) -> Iterator[Finding]:
    problem = answer.text("problem", max_length=sandbox.MAX_ANSWER_BYTES)
    rss_bytes, peak_bytes = answer.integer("rss_bytes"), answer.integer("peak_rss_bytes")
    if problem:
        yield error(
            "model", f"model {digest[:12]}: {problem}", "remove it from blobs/: the device fetches it again"
        )
        return
    if not digest:
        yield ok("model", f"ONNX Runtime runs ({rss_bytes / 1e6:.0f} MB); no model is installed yet")
    else:
        yield ok("model", f"model {digest[:12]} gives its known answer ({rss_bytes / 1e6:.0f} MB)")
    for key, used, limit in (
        ("budgets.rss_mb", rss_bytes, config.limits.rss_bytes),
        ("budgets.load_peak_mb", peak_bytes, config.costs.load_peak_bytes),
    ):
        if limit and used > limit:
            yield error(key, f"Python, the engine and the model alone take {used / 1e6:.0f} MB", "raise it")
        elif limit and used > 0.8 * limit:
            yield warning(
                key,
                f"Python, the engine and the model alone take {used / 1e6:.0f} MB of it",
                "the link needs some too",
            )


def _committed(config: DaemonConfig) -> tuple[str, str]:
    """Digest of the committed model ("" for none) and what is wrong with the record of it."""
    if not any((config.state_dir / f"record.{copy}.json").exists() for copy in "ab"):
        return "", ""  # nothing was ever installed, and `Slots` would make its folders
    try:
        slots = Slots(config.state_dir)
        record = slots.record()
        if record is None:
            return "", "; ".join(slots.damage)
        return lifecycle.from_document(record, config.model).committed or "", ""
    except (ContractError, OSError) as e:
        return "", str(e)

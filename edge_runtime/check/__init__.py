"""``skiffd --check``: what is wrong with a device, before it goes out."""

import json
import sys
from collections.abc import Iterator
from dataclasses import asdict
from typing import TextIO

from edge_runtime.check.broker import (
    Connect,
    Read,
    check_certificate,
    check_fleet_broker,
    check_source_broker,
)
from edge_runtime.check.finding import Finding, Level
from edge_runtime.check.machine import Machine, check_machine, this_machine
from edge_runtime.check.model import check_model
from edge_runtime.check.storage import check_names, check_source, check_state_dir, check_trust_root
from edge_runtime.config import DaemonConfig

__all__ = ["Finding", "Level", "check", "main"]


def check(
    config: DaemonConfig,
    *,
    offline: bool = False,
    machine: Machine | None = None,
    connect: Connect | None = None,
    read: Read | None = None,
) -> list[Finding]:
    """Everything that was looked at, in the order of the configuration; ``offline`` asks no broker.

    Changes nothing: a file is written into the state folder and removed again, and the fleet's broker sees the device
    come and go. ``machine``, ``connect`` and ``read`` are asked instead of this machine and its network.
    """
    return list(_findings(config, offline, machine or this_machine(), connect, read))


def _findings(
    config: DaemonConfig,
    offline: bool,  # noqa: FBT001 (private)
    machine: Machine,
    connect: Connect | None,
    read: Read | None,
) -> Iterator[Finding]:
    now_seconds = machine.now_seconds()
    yield from check_names(config)
    yield from check_machine(config, machine)
    yield from check_state_dir(config)
    yield from check_trust_root(config, now_seconds)
    yield from check_model(config)
    yield from check_source(config)
    yield from check_certificate(config, now_seconds)
    if not offline:
        yield from check_fleet_broker(config, connect, read)
        yield from check_source_broker(config, connect)


def main(
    config: DaemonConfig, *, as_json: bool = False, offline: bool = False, out: TextIO | None = None
) -> int:
    """Prints the findings, one a line or as one JSON list; 1 if any is an error, else 0."""
    out = out or sys.stdout
    findings = check(config, offline=offline)
    if as_json:
        out.write(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n")
    else:
        out.writelines(f"{finding}\n" for finding in findings)
    return int(any(finding.level is Level.ERROR for finding in findings))

"""`[broker]`: where it is, and as whom to connect."""

import os
from dataclasses import dataclass, field
from pathlib import Path

from aggregator.config.paths import resolved
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.topics import PROTOCOLS


@dataclass(frozen=True, slots=True, kw_only=True)
class IdentityConfig:
    """One MQTT identity: the aggregator reads telemetry, the coordinator writes releases, the publisher models."""

    username: str = ""
    password: str = field(default="", repr=False)
    certificate: str = ""
    key: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerConfig:
    """Where the broker is; ``ca`` turns TLS on."""

    host: str = "localhost"
    port: int = 1883
    ca: str = ""
    keepalive_seconds: int = 30
    protocol: str = "auto"
    aggregator: IdentityConfig = IdentityConfig()
    coordinator: IdentityConfig = IdentityConfig()
    publisher: IdentityConfig = IdentityConfig()


def read_broker(f: Fields, folder: Path) -> BrokerConfig:
    """The section; raises the reader's error family."""
    default = BrokerConfig()
    ca = f.text("ca", "")
    config = BrokerConfig(
        host=f.text("host", default.host),
        port=f.integer("port", default.port, low=1, high=65535),
        ca=str(resolved(ca, folder)) if ca else "",
        keepalive_seconds=f.integer("keepalive_seconds", default.keepalive_seconds, low=5, high=3600),
        protocol=f.text("protocol", default.protocol, choices=PROTOCOLS),
        aggregator=_identity(f.section("aggregator", {}), folder, "SKIFF_AGGREGATOR_PASSWORD"),
        coordinator=_identity(f.section("coordinator", {}), folder, "SKIFF_COORDINATOR_PASSWORD"),
        publisher=_identity(f.section("publisher", {}), folder, "SKIFF_PUBLISHER_PASSWORD"),
    )
    f.finish()
    return config


def _identity(f: Fields, folder: Path, secret: str) -> IdentityConfig:
    certificate, key = f.text("certificate", ""), f.text("key", "")
    if bool(certificate) != bool(key):
        raise f.fail("certificate", "and key belong together: give both or neither")
    config = IdentityConfig(
        username=f.text("username", ""),
        password=os.environ.get(secret, ""),
        certificate=str(resolved(certificate, folder)) if certificate else "",
        key=str(resolved(key, folder)) if key else "",
    )
    f.finish()
    return config

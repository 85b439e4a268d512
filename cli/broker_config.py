"""`skiff broker-config`: Mosquitto's configuration and access rules for a fleet, from the contract's topics."""

from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, SourceId
from edge_runtime.contract.topics import Topics

AGGREGATOR = "skiff-aggregator"
COORDINATOR = "skiff-coordinator"
PUBLISHER = "skiff-publisher"
LABELLER = "skiff-labeller"

MOSQUITTO_CONF = """\
# Mosquitto for a skiff fleet: mutual TLS, the certificate's common name is the user name.
per_listener_settings false
listener 8883
cafile /etc/mosquitto/certs/ca.crt
certfile /etc/mosquitto/certs/server.crt
keyfile /etc/mosquitto/certs/server.key
require_certificate true
use_identity_as_username true
allow_anonymous false
acl_file /etc/mosquitto/skiff.acl

# Retained releases, metadata and model chunks survive a restart.
persistence true
persistence_location /var/lib/mosquitto/
autosave_interval 60
# Without it a chunk of a model takes 44 ms instead of 0.02 ms.
set_tcp_nodelay true
message_size_limit 1048576
"""


def acl(fleet: FleetId) -> str:
    """Access rules: a device writes only under its own name; only the coordinator writes releases, only the labeller
    tells labels.
    """
    t = Topics(fleet)
    me, model = DeviceId("%u"), ModelName("+")
    release = t.release(CohortId("+"), model)
    trust = t.trust(1).removesuffix("1") + "+"
    chunk = t.chunk(Digest("+"), 0).removesuffix("0") + "+"
    every, source = DeviceId("+"), SourceId("+")
    lines = [
        f"# Topics of fleet {fleet}. %u is the certificate's common name, which is the device's name.",
        *(f"pattern write {topic}" for topic in (t.status(me), t.window(me, model), t.event(me))),
        *(f"pattern read {topic}" for topic in (t.ack(me), t.command(me))),
        *(f"pattern read {topic}" for topic in (release, trust, chunk)),
        "",
        f"user {AGGREGATOR}",
        *(f"topic read {t.every(what)}" for what in ("status", "window", "event", "labels")),
        f"topic write {t.ack(every)}",
        f"topic write {t.labels_ack(source)}",
        f"topic write {t.alarm()}",
        "",
        f"user {COORDINATOR}",
        f"topic write {release}",
        f"topic write {t.command(every)}",
        "",
        f"user {PUBLISHER}",
        f"topic write {trust}",
        f"topic write {chunk}",
        "",
        "# Whoever tells what was right, of any device: never a device itself, which could make any model look good.",
        f"user {LABELLER}",
        f"topic write {t.labels(source)}",
        f"topic read {t.labels_ack(source)}",
    ]
    return "\n".join(lines) + "\n"

"""Where a broker is; apart from the link, which loads paho and TLS: a configuration is read without them."""

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True, kw_only=True)
class Broker:
    """Where the broker is and who we are to it; ``ca``, ``certificate`` and ``key`` are paths of PEM files.

    TLS (1.2 or newer, host name checked) is spoken when ``ca`` is given, with a client certificate when that is given.
    ``protocol`` is one of `contract.topics.PROTOCOLS`: ``auto`` speaks MQTT 5, and 3.1.1 with a broker that refuses it
    or falls silent.
    """

    host: str
    port: int = 1883
    username: str = ""
    password: str = field(default="", repr=False)
    ca: str = ""
    certificate: str = ""
    key: str = ""
    keepalive_seconds: int = 30
    protocol: str = "auto"

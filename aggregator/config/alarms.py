"""`[alarms]`: who is told."""

from dataclasses import dataclass
from urllib.parse import urlsplit

from edge_runtime.contract.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class AlarmsConfig:
    """Who is told when an incident opens, escalates or closes, besides the log and the ledger.

    ``mqtt`` publishes at the fleet's alarm topic, ``webhook`` is an address for a POST (``SKIFF_ALARM_TOKEN`` in the
    environment is sent as a bearer token), ``command`` is given a JSON file in place of ``{alarm}``. An attempt takes
    ``timeout_seconds`` at most; what fails is tried again until it is ``keep_hours`` old.
    """

    mqtt: bool = False
    webhook: str = ""
    command: tuple[str, ...] = ()
    timeout_seconds: float = 10.0
    keep_hours: float = 168.0

    @property
    def sinks(self) -> tuple[str, ...]:
        """The names of those that are to be told."""
        wanted = {"mqtt": self.mqtt, "webhook": bool(self.webhook), "command": bool(self.command)}
        return tuple(name for name, is_wanted in wanted.items() if is_wanted)


def read_alarms(f: Fields) -> AlarmsConfig:
    """The section; raises the reader's error family."""
    d = AlarmsConfig()
    config = AlarmsConfig(
        mqtt=f.flag("mqtt", d.mqtt),
        webhook=f.text("webhook", d.webhook),
        command=f.texts("command", d.command),
        timeout_seconds=f.number("timeout_seconds", d.timeout_seconds, low=0.1, high=3600.0),
        keep_hours=f.number("keep_hours", d.keep_hours, low=0.0, high=8760.0),
    )
    f.finish()
    url = urlsplit(config.webhook)
    if config.webhook and not (url.scheme in ("http", "https") and url.hostname):
        raise f.fail("webhook", f"{config.webhook!r} is no address; give 'https://HOST/PATH'")
    if url.password is not None:
        raise f.fail("webhook", "holds a password; put a token into SKIFF_ALARM_TOKEN")
    if config.command and "{alarm}" not in config.command:
        raise f.fail("command", "has no '{alarm}' word: the command needs the path of the alarm's file")
    return config

"""`[metrics]`: figures for Prometheus."""

from dataclasses import dataclass

from edge_runtime.contract.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class MetricsConfig:
    """Figures for Prometheus, at ``/metrics`` of ``listen`` (host:port); empty: nowhere.

    What has to be asked of the stores is asked every ``refresh_seconds``. An online device counts as silent when
    it sent no window for ``silent_seconds``.
    """

    listen: str = ""
    refresh_seconds: float = 15.0
    silent_seconds: float = 3600.0

    @property
    def address(self) -> tuple[str, int] | None:
        """Host and port, None when nobody is to listen."""
        host, _, port = self.listen.rpartition(":")
        return (host, int(port)) if host else None


def read_metrics(f: Fields) -> MetricsConfig:
    """The section; raises the reader's error family."""
    default = MetricsConfig()
    config = MetricsConfig(
        listen=f.text("listen", default.listen),
        refresh_seconds=f.number("refresh_seconds", default.refresh_seconds, low=0.1),
        silent_seconds=f.number("silent_seconds", default.silent_seconds, low=1.0),
    )
    f.finish()
    host, _, port = config.listen.rpartition(":")
    if config.listen and not (host and port.isascii() and port.isdigit() and int(port) < 1 << 16):
        raise f.fail("listen", f"{config.listen!r} is not HOST:PORT, for example '127.0.0.1:9464'")
    return config

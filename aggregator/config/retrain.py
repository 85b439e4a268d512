"""`[retrain]`: the hook that makes a better model."""

from dataclasses import dataclass

from edge_runtime.contract.fields import Fields


@dataclass(frozen=True, slots=True, kw_only=True)
class RetrainConfig:
    """The hook that makes a better model; ``{request}`` in ``command`` is the path of the request's JSON file.

    With no command a request is recorded and nothing runs. ``cooldown_seconds`` is the least time between two requests
    of a model.
    """

    command: tuple[str, ...] = ()
    timeout_seconds: float = 3600.0
    cooldown_seconds: float = 3600.0


def read_retrain(f: Fields) -> RetrainConfig:
    """The section; raises the reader's error family."""
    default = RetrainConfig()
    config = RetrainConfig(
        command=f.texts("command", default.command),
        timeout_seconds=f.number("timeout_seconds", default.timeout_seconds, low=1.0),
        cooldown_seconds=f.number("cooldown_seconds", default.cooldown_seconds, low=0.0),
    )
    f.finish()
    if config.command and "{request}" not in config.command:
        raise f.fail("command", "has no '{request}' word: the hook needs the path of the request's file")
    return config

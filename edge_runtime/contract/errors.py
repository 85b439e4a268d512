"""The few error families a caller acts on; the message says what was wrong, where, and what to do."""


class SkiffError(Exception):
    """Base of every error skiff raises on purpose."""


class ContractError(SkiffError):
    """A peer sent something that breaks the contract (version, size, field): drop it and say so."""


class ArtifactError(SkiffError):
    """A model file is damaged, unsigned, foreign, or not what its manifest says: do not run it."""


class LinkError(SkiffError):
    """The broker cannot be reached or refused us: retry with backoff."""


class BudgetExceeded(SkiffError):
    """A declared memory, latency or size limit was passed."""


class ConfigError(SkiffError):
    """A configuration file is wrong; the message names the file, the key and the nearest valid one."""


class InputError(SkiffError, ValueError):
    """A row breaks the model's schema; nothing was predicted for it.

    ``reason`` is a short stable word (``width``, ``missing``, ``non_finite``, ``unknown_feature``,
    ``type``, ``unseen``, ``range``, ``undefined``) under which the refusal is counted.
    """

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class UnsupportedPipeline(SkiffError):
    """A pipeline that cannot be converted; names the step, the reason and a remedy."""


class ParityError(SkiffError):
    """The artifact and the pipeline disagree; names the worst row and how large the error is."""

"""From a model's file to an engine that may serve."""

from pathlib import Path
from typing import Final

from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import ArtifactError
from edge_runtime.contract.ids import Digest
from edge_runtime.engine import Engine

TRIAL_RUN_LIMIT_SECONDS: Final = 30.0
"""What a run of a model on trial may take where the configuration has no limit: a hang would be for ever.

One that is committed keeps the limit until the process starts again.
"""


def load_model(path: Path, digest: Digest, config: DaemonConfig, *, on_trial: bool = False) -> Engine:
    """A fresh engine of a file whose hash is checked, and that has just given a golden row its answer here.

    Raises:
        ArtifactError: see `Engine`, or the answer is another than the pipeline's.
        BudgetExceeded: it does not fit into memory.
    """
    engine = Engine(
        path,
        threads=config.threads,
        arena=config.arena,
        run_limit_seconds=config.run_limit_seconds or (TRIAL_RUN_LIMIT_SECONDS if on_trial else 0.0),
        expect=digest,
    )
    if problem := engine.golden_problem():
        raise ArtifactError(f"{path}: {problem}")
    return engine

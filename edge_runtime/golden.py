"""Whether a model still answers its golden rows as its pipeline did."""

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract.manifest import ArtifactInfo, agrees, unsure


def problem(
    info: ArtifactInfo, labels: NDArray[np.int64] | None, scores: NDArray[np.float32], part: slice
) -> str:
    """What is wrong with the answers to the golden rows ``part`` of the artifact; empty when nothing is.

    ``labels`` and ``scores`` are those of `Engine.run`. Scores agree within the project's tolerance, labels wherever
    the pipeline's own scores decide.
    """
    golden = info.golden
    wanted = golden.scores[part]
    if scores.shape != wanted.shape:
        return f"golden rows: scores of shape {scores.shape} instead of {wanted.shape}"
    bad: NDArray[np.bool_] = np.logical_not(agrees(scores, wanted).all(axis=1))
    if labels is not None:
        wrong = (labels != golden.labels[part]) & ~unsure(info.manifest, wanted)
        bad |= wrong.reshape(len(wrong), -1).any(axis=1)
    if not bad.any():
        return ""
    worst = int(np.flatnonzero(bad)[0])
    error = float(np.abs(scores[worst].astype(np.float64) - wanted[worst]).max())
    return (
        f"{int(bad.sum())} of {len(bad)} golden rows are answered differently here than by the pipeline; the first "
        f"is row {(part.start or 0) + worst}, off by {error:.3g}: convert the model again, for this processor"
    )

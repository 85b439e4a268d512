"""A whole training run: fit, evaluate, convert, prove, write one artifact."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from converters.artifact import Artifact, convert
from edge_runtime.contract.profile import CellSpec
from trainer.aimed import Aim, Outcome, fit_to
from trainer.fit import fit
from trainer.spec import TrainSpec

Progress = Callable[[str, int, int], None]
"""Called with the name of the stage, how much of it is done, and how much there is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Made:
    """A proven artifact, and its ``measure`` on each part of the rows it has not seen.

    ``outcome`` is what became of the aim, None where there was none.
    """

    artifact: Artifact
    evaluation: tuple[tuple[str, float], ...]
    measure: str
    training_rows: int
    outcome: Outcome | None = None


def run(
    spec: TrainSpec,
    out: Path | str,
    *,
    layout: CellSpec | None = None,
    aim: Aim | None = None,
    progress: Progress | None = None,
) -> Made:
    """Makes the artifact of ``spec`` and writes it to ``out``; the same spec and rows give the same bytes.

    ``layout`` is that of the model this one succeeds, so that drift history stays comparable; ``aim`` is the fleet that
    training rows are re-weighted to, which the certificate then says.

    Raises what `trainer.fit.fit`, `trainer.aimed.fit_to` and `converters.convert` raise.
    """
    if progress is not None:
        progress("fit", 0, 1)
    fitted, outcome = (fit(spec), None) if aim is None else fit_to(spec, aim)
    if progress is not None:
        progress("fit", 1, 1)
    artifact = convert(
        fitted.pipeline,
        fitted.training.X,
        out,
        name=spec.name,
        version=spec.version,
        y=fitted.training.y,
        groups=fitted.training.groups,
        probes=spec.probes,
        seed=spec.seed,
        layout=layout,
        budgets=spec.budgets,
        ranges=fitted.ranges,
        notes=() if outcome is None else (outcome.summary,),
        progress=progress,
    )
    return Made(
        artifact=artifact,
        evaluation=fitted.evaluation,
        measure=fitted.measure,
        training_rows=len(fitted.training.X),
        outcome=outcome,
    )

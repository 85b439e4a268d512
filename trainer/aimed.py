"""Fitting for a fleet that is known by its histograms only: training rows are re-weighted to it where that helps."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.pipeline import Pipeline

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.fields import nearest
from edge_runtime.contract.profile import CellSpec, Profile
from trainer.datasets import DatasetError
from trainer.fit import (
    Fitted,
    Rows,
    Split,
    evaluated,
    fitted_to,
    make_pipeline,
    measure_of,
    ranges_for,
    read_rows,
    score,
)
from trainer.reweight import Reweighting, Weights, reweight
from trainer.spec import TrainSpec


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Aim:
    """The fleet to fit for: its ``devices``' profiles under the cells ``spec``, at least one, each with rows.

    With ``every`` all features are fitted, not only those that moved. With ``insist`` weights are used without being
    tried, or the run is refused; else rows count alike whenever weights are not shown to help. ``others`` says that the
    model is for other devices as well: then weights must not make it worse on held-out rows as they are either.
    """

    spec: CellSpec
    devices: Sequence[Profile]
    every: bool = False
    insist: bool = False
    others: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """The ``measure`` on held-out rows weighted to the fleet: of the ``plain`` model and of the ``reweighted`` one.

    ``effective`` is how many rows of equal weight the held-out rows say as much as.
    """

    measure: str
    plain: float
    reweighted: float
    effective: float

    @property
    def text(self) -> str:
        """Both figures."""
        return f"{self.measure} {self.reweighted:.4f} instead of {self.plain:.4f} ({self.effective:.0f} effective rows)"


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcome:
    """What became of an aim: the weights, whether they were ``used``, the trial if there was one, and why not used."""

    reweighting: Reweighting
    used: bool
    trial: Trial | None = None
    why: str = ""

    @property
    def summary(self) -> str:
        """One sentence, for a certificate or an audit log."""
        found, rows = self.reweighting, len(self.reweighting.weights)
        if not self.used:
            return f"training rows count alike: {self.why}"
        return (
            f"training rows re-weighted to {found.devices} devices in {len(found.fitted)} of {len(found.features)} "
            f"features: {rows} rows say as much as {found.effective:.0f}, largest weight {found.largest:.2f}"
        )


def fit_to(spec: TrainSpec, aim: Aim) -> tuple[Fitted, Outcome]:
    """Fits ``spec`` for the fleet of ``aim``.

    Unless ``aim`` insists, both models are made, with weights and without, and the one is taken that does better on the
    held-out rows, weighted to the fleet likewise (importance-weighted validation: M. Sugiyama, M. Krauledat,
    K.-R. Müller, *Covariate shift adaptation by importance weighted cross validation*, JMLR 8, 2007).

    Raises `DatasetError` when ``aim`` insists and the overlap is too poor, and `ConfigError` when the rows' columns are
    not the layout's, or as `trainer.fit.fit` does.
    """
    split = read_rows(spec)
    ranges = ranges_for(spec, split.feature_names)
    _check_columns(split.feature_names, aim.spec)
    found = reweight(aim.spec, split.training.X, aim.devices, every=aim.every)
    if found.problems and aim.insist:
        raise DatasetError(f"model {spec.name}: training rows cannot be re-weighted: {_and(found)}")

    def made(weights: Weights | None) -> Pipeline:
        return fitted_to(split, make_pipeline(spec.model, spec.seed), spec.name, weights)

    trial = None
    if found.problems:
        pipeline, why = made(None), _and(found)
    elif not found.fitted:
        pipeline, why = made(None), "they look like the fleet as they are"
    elif aim.insist:
        pipeline, why = made(found.weights), ""
    else:
        pipeline, plain = made(found.weights), made(None)
        trial, why = _try(plain, pipeline, split, aim, measure_of(spec.model))
        pipeline = plain if why else pipeline
    outcome = Outcome(reweighting=found, used=not why, trial=trial, why=why)
    return evaluated(spec, split, ranges, pipeline), outcome


def _try(
    plain: Pipeline, weighted: Pipeline, split: Split, aim: Aim, measure: str
) -> tuple[Trial | None, str]:
    """Both models on all held-out rows, and why ``weighted`` is not the one to take; empty when it is."""
    parts = [rows for _, rows in split.evaluation]
    rows = Rows(X=np.concatenate([part.X for part in parts]), y=np.concatenate([part.y for part in parts]))
    found = reweight(aim.spec, rows.X, aim.devices, every=aim.every)
    if found.problems:
        return None, f"that it helps cannot be shown, for held-out rows have the same need: {_and(found)}"
    trial = Trial(
        measure=measure,
        plain=score(plain, rows, found.weights),
        reweighted=score(weighted, rows, found.weights),
        effective=found.effective,
    )
    if trial.reweighted < trial.plain:
        return trial, f"weights make it worse on held-out rows that are weighted to the fleet, {trial.text}"
    if aim.others and (now := score(weighted, rows)) < (before := score(plain, rows)):
        return (
            trial,
            f"weights make it worse on held-out rows as they are, {measure} {now:.4f} instead of {before:.4f}",
        )
    return trial, ""


def _and(found: Reweighting) -> str:
    return ". Also: ".join(found.problems)


def _check_columns(names: tuple[str, ...], spec: CellSpec) -> None:
    """Raises `ConfigError` when the rows' columns are not those that devices count."""
    counted = tuple(column.name for column in spec.features)
    for at, name in enumerate(counted):
        if names[at : at + 1] != (name,):
            instead = f"{names[at]!r}{nearest(names[at], counted)}" if at < len(names) else "nothing"
            raise ConfigError(
                f"data: column {at + 1} is {instead} where devices of the fleet count {name!r}; give the data the "
                "columns of the model that is replaced, in its order"
            )
    if len(names) > len(counted):
        raise ConfigError(
            f"data: devices of the fleet do not count {names[len(counted)]!r}; leave the column out"
        )

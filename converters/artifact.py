"""From a fitted pipeline to one proven ``.onnx`` file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from converters import files
from converters import signature as signatures
from converters import table as tables
from converters.diagnosis import culprit
from converters.gate import check_bytes, check_static
from converters.lowering import lower
from converters.lowering.graph import Arithmetic, Lowering
from converters.onnx_export import fallback
from converters.optimize import INPUT, IR_VERSION, LABEL, OPSET, SCORE, optimise, to_bytes
from converters.parity import ParityFailure, Progress, compare, probes_for, worst_rows
from converters.probe_inputs import Probes, rows_in_cells
from converters.reference import (
    CHUNK,
    Acceptance,
    Answers,
    Float32Effect,
    accepted_values,
    answers,
    rounding_effect,
    ties_of,
)
from converters.report import ParityReport
from converters.signature import Signature, by_position
from converters.table import InputDtype, Rows, Table
from edge_runtime.contract import ids
from edge_runtime.contract.errors import (
    ArtifactError,
    ConfigError,
    ContractError,
    InputError,
    UnsupportedPipeline,
)
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import (
    TOLERANCE,
    Budgets,
    Feature,
    Golden,
    Manifest,
    Reference,
    agrees,
    to_metadata,
)
from edge_runtime.contract.profile import (
    Binner,
    CellSpec,
    Profile,
    category_cells,
    cells_from_training,
    empty_profile,
    merge_all,
)
from edge_runtime.engine import Engine

__all__ = ["Artifact", "check_static", "convert"]

GOLDEN_ROWS: Final = 64
GOLDEN_BYTES: Final = 48 * 1024
NARROW_SHARE: Final = 0.25
"""float32 arithmetic is taken when a first look at all kinds of rows uses no more than this share of the tolerance."""
_FIRST_LOOK: Final = 1024
_LIBRARIES: Final = ("numpy", "onnx", "onnxruntime", "scikit-learn", "skiff-edge", "skl2onnx")


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """A proven model file: where it is, what it says of itself, and how the proof went."""

    path: Path
    manifest: Manifest
    report: ParityReport
    digest: Digest


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Parts:
    """What every version of the file shares while its graph and its certificate are still open."""

    manifest: Manifest
    spec: CellSpec
    golden: Golden

    def file(
        self,
        model: ModelProto,
        certificate: Mapping[str, object],
        groups: tuple[tuple[str, Profile], ...] = (),
        total: Profile | None = None,
    ) -> bytes:
        probabilities = self.manifest.probabilities
        reference = Reference(
            spec=self.spec,
            total=empty_profile(self.spec, probabilities=probabilities) if total is None else total,
            groups=groups,
        )
        return to_bytes(model, to_metadata(self.manifest, reference, self.golden, certificate))


def convert(  # noqa: PLR0913 - the public surface; everything beyond the first three is named
    pipeline: Any,
    X: Any,
    out: str | Path = "model.onnx",
    *,
    name: str = "model",
    version: str = "1.0.0",
    y: Any = None,
    groups: Any = None,
    probes: int = 100_000,
    seed: int = 0,
    layout: CellSpec | None = None,
    budgets: Budgets = Budgets(),  # noqa: B008 - frozen
    input_dtype: Literal["auto", "float32", "float64"] = "auto",
    progress: Progress | None = None,
) -> Artifact:
    """Converts a fitted pipeline, proves the result against it on hostile rows, and writes one ``.onnx`` file.

    The same arguments give the same bytes. The file is written in one piece at the end, or not at all.

    Args:
        pipeline: a fitted `Pipeline`, or any estimator with ``predict``.
        X: (n, F) training rows, an array or a pandas or polars data frame of numbers and categories; they are counted
            into the reference profile, never stored.
        out: where to write.
        name: the model family, as in topics: lower-case letters, digits and hyphens.
        version: the model's version.
        y: (n,) training targets, for the training digest only.
        groups: (n,) the device, person or site of each row, for one reference profile each.
        probes: about how many rows to compare.
        seed: fixes the rows drawn.
        layout: the cells of the model this one succeeds, so that drift history stays comparable.
        budgets: limits to declare in the manifest.
        input_dtype: what devices send; ``auto`` is float32 unless that changes the pipeline's own answers.
        progress: called with a stage, how much of it is done, and how much there is. Stages are read, lower, probe
            (rows are made), export, look (a first comparison, where there are trees), prove and write.

    Raises:
        UnsupportedPipeline: a step, a label or a column cannot be converted; says which, why and what to do.
        ParityError: the graph disagrees with the pipeline (a `ParityFailure`, with the report).
        InputError: ``X``, ``y`` or ``groups`` do not fit the pipeline or each other.
        ConfigError: ``layout`` or ``probes`` cannot be used.
        ContractError: ``name`` or ``version`` is not one.
        ArtifactError: the metadata or the file would be too large.
    """
    told = _silent if progress is None else progress
    told("read", 0, 1)
    signature = signatures.read(pipeline)
    table = tables.read(signature, X)
    membership = _membership(groups, len(table.wide))
    subject = _choose_input(signature, table, input_dtype)
    spec = _layout(layout, subject)
    parts = _Parts(
        manifest=_manifest(
            subject,
            spec.layout,
            name=name,
            version=version,
            budgets=budgets,
            digest=tables.training_digest(table, y),
        ),
        spec=spec,
        golden=_golden(subject, spec, seed),
    )
    told("lower", 0, 1)
    widest = lower(signature, dtype=subject.dtype, vocabularies=table.vocabularies, fallback=fallback)
    told("probe", 0, 1)
    rows = probes_for(signature, table, widest, spec, takes=subject.takes, probes=probes, seed=seed)
    model, draft, arithmetic = _choose(subject, widest, parts, rows, told)
    total_rows = sum(rows.sizes.values())
    told("prove", 0, total_rows)
    report = replace(
        compare(draft, signature, table, rows, progress=told, total=total_rows),
        probes=probes,
        seed=seed,
        arithmetic=arithmetic,
        remedies=subject.remedies,
        notes=tuple(widest.notes),
        coverage=rows.coverage,
        float32=subject.effect,
    )
    if not report.passed:
        raise ParityFailure(report, culprit(signature, partial(_disagrees, subject, parts, report)))
    total, profiles = _profiles(draft, spec, subject.rows, membership)
    data = parts.file(model, report.to_certificate(), profiles, total)
    told("write", 0, 1)
    check_bytes(data, str(out))
    engine = Engine(data)
    _check_golden(signature, engine, parts.golden)
    path = _write(Path(out), data)
    told("write", 1, 1)
    return Artifact(
        path=path,
        manifest=parts.manifest,
        report=replace(report, digest=engine.digest),
        digest=engine.digest,
    )


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _membership(groups: Any, rows: int) -> NDArray[np.str_] | None:
    if groups is None:
        return None
    found = np.asarray([str(value) for value in np.asarray(groups).ravel()])
    if len(found) != rows:
        raise InputError("width", f"groups has {len(found)} values for {rows} rows")
    return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Subject:
    """A pipeline with its training rows as devices send them."""

    signature: Signature
    table: Table
    dtype: InputDtype
    rows: Rows
    answers: Answers
    effect: Float32Effect
    takes: Acceptance
    remedies: tuple[str, ...]


def _choose_input(
    signature: Signature, table: Table, wanted: Literal["auto", "float32", "float64"]
) -> _Subject:
    """The narrowest input dtype that leaves the pipeline's own answers on the training rows as they are."""
    choices: tuple[InputDtype, ...] = ("float32", "float64") if wanted == "auto" else (wanted,)
    problems: list[str] = []
    for dtype in choices:
        rows = table.rows(dtype)
        beyond = np.isinf(rows)
        if beyond.any():
            row, column = (int(i) for i in np.argwhere(beyond)[0])
            problems.append(f"column {table.names[column]!r}, row {row} is too large for {dtype}")
            continue
        found = answers(signature, table, rows)
        if not found.accepted.all():
            row = int(np.flatnonzero(~found.accepted)[0])
            raise InputError("type", f"X: the pipeline refuses row {row} as {dtype}: {found.reason}")
        effect, problem = rounding_effect(signature, table, found, dtype)
        if not problem:
            return _Subject(
                signature=signature,
                table=table,
                dtype=dtype,
                rows=rows,
                answers=found,
                effect=effect,
                takes=accepted_values(signature, table, rows),
                remedies=tuple(f"float64 input, because {problem}" for problem in problems),
            )
        problems.append(problem)
    raise UnsupportedPipeline(f"{problems[0]}; {_INPUT_REMEDY[wanted]}")


_INPUT_REMEDY: Final = {
    "auto": "scale the column in float64 before the pipeline",
    "float32": "pass input_dtype='float64', or subtract an offset from the column before the pipeline",
    "float64": "scale the column before the pipeline",
}


def _layout(given: CellSpec | None, subject: _Subject) -> CellSpec:
    signature, table = subject.signature, subject.table
    classes = len(signature.single)
    if given is None:
        return CellSpec(
            features=tuple(
                cells_from_training(column.name, subject.rows[:, j])
                if column.vocabulary is None
                else category_cells(column.name, len(column.vocabulary))
                for j, column in enumerate(table.columns)
            ),
            score=cells_from_training(signature.score, subject.answers.scores.max(axis=1).astype(np.float32)),
            classes=classes,
        )
    names = tuple(cells.name for cells in given.features)
    if names != table.names or given.classes != classes:
        raise ConfigError(
            f"layout {given.layout} has the columns {', '.join(names)} and {given.classes} classes; this pipeline has "
            f"{', '.join(table.names)} and {classes}: leave layout out to start a new one"
        )
    return given


def _manifest(
    subject: _Subject,
    layout: ids.LayoutId,
    *,
    name: str,
    version: str,
    budgets: Budgets,
    digest: Digest,
) -> Manifest:
    if not ids.VERSION.fullmatch(version):
        raise ContractError(f"{version!r} is not a version: it must match {ids.VERSION.pattern}")
    signature, takes = subject.signature, subject.takes
    return Manifest(
        name=ids.model_name(name),
        version=version,
        task=signature.task,
        score=signature.score,
        features=tuple(
            Feature(
                name=column.name,
                kind="number" if column.vocabulary is None else "category",
                vocabulary=column.vocabulary or (),
                missing=bool(takes.missing[j]),
                infinite=bool(takes.infinite[j]),
                unseen=bool(takes.unseen[j]),
            )
            for j, column in enumerate(subject.table.columns)
        ),
        labels=signature.single,
        multilabels=signature.labels if len(signature.labels) > 1 else (),
        input_name=INPUT,
        input_dtype=subject.dtype,
        label_output=LABEL if signature.labels else "",
        score_output=SCORE,
        opset=OPSET,
        ir_version=IR_VERSION,
        layout=layout,
        training_digest=digest,
        libraries=tuple((library, metadata.version(library)) for library in _LIBRARIES),
        budgets=budgets,
    )


def _golden(subject: _Subject, spec: CellSpec, seed: int) -> Golden:
    """Synthetic rows with the pipeline's answers; an eighth of them with missing values where these may occur."""
    count = max(4, min(GOLDEN_ROWS, GOLDEN_BYTES // (4 * len(spec.features))))
    rng = np.random.default_rng([seed, len(spec.features)])
    sizes = np.array([len(column.vocabulary or ()) for column in subject.table.columns])
    rows = rows_in_cells(spec, rng, 4 * count, sizes, subject.takes.unseen, subject.rows.dtype)
    holes = subject.takes.missing & (rng.random(rows.shape) < 0.5)
    holes[np.arange(len(rows)) % 8 != 0] = False
    rows[holes] = np.nan
    found = answers(subject.signature, subject.table, rows)
    kept = np.flatnonzero(found.accepted)[:count]
    if not kept.size:
        raise InputError(
            "type", "the pipeline refuses every row drawn from its own training cells; rescale the columns"
        )
    labels = found.labels[kept]
    return Golden(
        rows=rows[kept],
        labels=labels if len(subject.signature.labels) > 1 else labels[:, 0],
        scores=found.scores[kept],
    )


def _choose(
    subject: _Subject, widest: Lowering, parts: _Parts, rows: Probes, told: Progress
) -> tuple[ModelProto, Engine, Arithmetic]:
    """The cheapest graph with room to spare: float32 where a first look leaves most of the tolerance unused.

    Only the sums of trees' leaves are ever taken in float32; everything else is float64 in both.
    """
    signature = subject.signature
    if widest.ensemble_nodes:
        told("export", 0, 2)
        narrow = lower(
            signature,
            dtype=subject.dtype,
            arithmetic="float32",
            vocabularies=subject.table.vocabularies,
            fallback=fallback,
        )
        model = _model(signature, narrow)
        engine = Engine(parts.file(model, {}))
        told("look", 0, 1)
        look = compare(engine, signature, subject.table, rows.limited(_FIRST_LOOK))
        if look.passed and look.max_rel_error <= NARROW_SHARE * TOLERANCE:
            return model, engine, "float32"
        engine.close()
    told("export", 1, 2)
    model = _model(signature, widest)
    return model, Engine(parts.file(model, {})), "float64"


def _disagrees(subject: _Subject, parts: _Parts, report: ParityReport, part: Signature) -> bool:
    """Whether the graph of a part of the pipeline differs from it on the worst rows."""
    table = subject.table
    rows = worst_rows(report, table, subject.dtype)
    with by_position():
        wanted = part.pipeline.predict(table.restore(rows))
    spec = replace(parts.spec, classes=0)
    trial = _Parts(
        manifest=replace(
            parts.manifest,
            task="regressor",
            score="predict",
            labels=(),
            multilabels=(),
            label_output="",
            layout=spec.layout,
        ),
        spec=spec,
        golden=Golden(rows=rows[:1], labels=np.zeros(1, np.int64), scores=wanted[:1]),
    )
    lowered = lower(part, dtype=subject.dtype, vocabularies=table.vocabularies, fallback=fallback)
    engine = Engine(trial.file(_model(part, lowered), {}))
    try:
        return not agrees(engine.run(rows)[1], wanted).all()
    finally:
        engine.close()


def _model(signature: Signature, lowered: Lowering) -> ModelProto:
    return optimise(
        lowered.graph(), dtype=lowered.dtype, width=signature.width, outputs=len(signature.labels)
    )


def _profiles(
    engine: Engine, spec: CellSpec, rows: Rows, membership: NDArray[np.str_] | None
) -> tuple[Profile, tuple[tuple[str, Profile], ...]]:
    """Training rows counted as a device counts: with the artifact's own outputs. The total is the sum of the groups."""
    probabilities = engine.info.manifest.probabilities
    labels, scores = engine.run(rows)
    indices = labels if labels is not None and labels.ndim == 1 else np.zeros(len(rows), np.int64)
    if membership is None:
        return _counted(spec, rows, indices, scores, probabilities=probabilities), ()
    groups = []
    for name in sorted(set(membership.tolist())):
        at = np.flatnonzero(membership == name)
        groups.append((name, _counted(spec, rows[at], indices[at], scores[at], probabilities=probabilities)))
    return merge_all(spec, [p for _, p in groups], probabilities=probabilities), tuple(groups)


def _counted(
    spec: CellSpec, rows: Rows, labels: NDArray[np.int64], scores: NDArray[np.float32], *, probabilities: bool
) -> Profile:
    binner = Binner(spec, probabilities=probabilities)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        binner.observe(rows[part], labels[part], scores[part])
    return binner.take()


def _check_golden(signature: Signature, engine: Engine, golden: Golden) -> None:
    labels, scores = engine.run(golden.rows)
    wrong = ~agrees(scores, golden.scores).all(axis=1)
    if labels is not None:
        differs = labels.reshape(len(scores), -1) != golden.labels.reshape(len(scores), -1)
        wrong |= (differs & ~ties_of(signature, golden.scores)).any(axis=1)
    if wrong.any():
        raise ArtifactError(
            f"golden row {int(np.flatnonzero(wrong)[0])} does not come out of the finished file: report this as a bug"
        )


def _write(path: Path, data: bytes) -> Path:
    try:
        files.write(path, data)
    except OSError as e:
        raise ConfigError(f"{path}: cannot be written ({e.strerror})") from e
    return path

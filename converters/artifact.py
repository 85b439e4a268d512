"""From a fitted pipeline to one proven ``.onnx`` file."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from converters import files
from converters import ranges as declared
from converters import signature as signatures
from converters import table as tables
from converters.diagnosis import culprit
from converters.gate import check_bytes, check_static
from converters.lowering import lower
from converters.lowering.graph import Arithmetic, Lowering
from converters.onnx_export import fallback
from converters.optimize import optimise, to_bytes
from converters.parity import ParityFailure, Progress, compare, probes_for, run, with_golden, worst_rows
from converters.probe_inputs import Probes
from converters.ranges import Ranges
from converters.reference import (
    CHUNK,
    ties_of,
)
from converters.report import ParityReport, ranges_of
from converters.signature import Signature, by_position, final
from converters.subject import Subject, choose_input, golden_for, layout_for, manifest_for
from converters.table import Rows
from edge_runtime.contract.errors import (
    ArtifactError,
    BudgetExceeded,
    ConfigError,
    InputError,
    UnsupportedPipeline,
)
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import (
    TOLERANCE,
    Budgets,
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
    empty_profile,
    merge_all,
)
from edge_runtime.engine import Engine

__all__ = ["Artifact", "check_static", "convert"]

NARROW_SHARE: Final = 0.25
"""float32 arithmetic is taken when a first look at all kinds of rows uses no more than this share of the tolerance."""
_FIRST_LOOK: Final = 1024


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
    ranges: Ranges | None = None,
    real_rows: bool = False,
    notes: Sequence[str] = (),
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
        ranges: where the model is proven and used: devices refuse rows outside. A mapping of features' names to the
            smallest and the largest value (both allowed; None for no limit), or ``"training"`` for the range of the
            training rows in every column of numbers, widened by as much on each side. Without it there is no limit.
        real_rows: whether training rows, and worst rows built from them, may travel in the artifact: half of its golden
            rows are then real. Without it all rows in its metadata are synthetic. The certificate says which.
        notes: what the certificate shall say besides of how the model was made.
        progress: called with a stage, how much of it is done, and how much there is. Stages are read, lower, probe
            (rows are made), export, look (a first comparison, where there are trees), prove and write.

    Raises:
        UnsupportedPipeline: a step, a label or a column cannot be converted, or only to a file that is too large or
            that ONNX Runtime does not run; says which, why and what to do.
        ParityError: the graph disagrees with the pipeline (a `ParityFailure`, with the report).
        InputError: ``X``, ``y`` or ``groups`` do not fit the pipeline or each other, or rows lie outside ``ranges``.
        ConfigError: ``layout``, ``probes`` or ``ranges`` cannot be used.
        ContractError: ``name`` or ``version`` is not one.
    """
    told = _silent if progress is None else progress
    told("read", 0, 1)
    signature = signatures.read(pipeline)
    table = tables.read(signature, X)
    membership = _membership(groups, len(table.wide))
    limits = declared.read(ranges, table)
    subject = choose_input(signature, table, input_dtype)
    if limits is not None:
        takes = replace(subject.takes, limits=declared.rounded(limits, subject.dtype))
        subject = replace(subject, takes=takes)
    spec = layout_for(layout, subject)
    parts = _Parts(
        manifest=manifest_for(
            subject,
            spec.layout,
            name=name,
            version=version,
            budgets=budgets,
            digest=tables.training_digest(table, y),
        ),
        spec=spec,
        golden=golden_for(subject, spec, seed, real_rows=real_rows),
    )
    with _runnable(signature):
        told("lower", 0, 1)
        widest = lower(signature, dtype=subject.dtype, vocabularies=table.vocabularies, fallback=fallback)
        told("probe", 0, 1)
        rows = probes_for(signature, table, widest, spec, takes=subject.takes, probes=probes, seed=seed)
        model, draft, arithmetic = _choose(subject, widest, parts, rows, told)
        every = with_golden(parts.golden, rows, real_rows=real_rows)
        total_rows = len(parts.golden.rows) + sum(rows.sizes.values())
        told("prove", 0, total_rows)
        report = replace(
            compare(draft, signature, table, every, progress=told, total=total_rows),
            probes=probes,
            seed=seed,
            arithmetic=arithmetic,
            remedies=subject.remedies,
            notes=(*widest.notes, *declared.note(parts.manifest), *notes),
            ranges=ranges_of(parts.manifest),
            coverage=rows.coverage,
            float32=subject.effect,
            real_rows=real_rows,
        )
        if not report.passed:
            step = culprit(signature, partial(_disagrees, subject, parts, report))
            raise ParityFailure(report, step, widest.doubts)
        parts = replace(parts, manifest=replace(parts.manifest, undefined=report.undefined > 0))
        total, profiles = _profiles(draft, spec, subject.rows, membership)
        data = parts.file(model, report.to_certificate(), profiles, total)
        told("write", 0, 1)
        engine = _opened(data)
        _check_golden(signature, engine, parts.golden)
    path = _write(Path(out), data)
    told("write", 1, 1)
    return Artifact(
        path=path,
        manifest=parts.manifest,
        report=replace(report, digest=engine.digest),
        digest=engine.digest,
    )


@contextmanager
def _runnable(signature: Signature) -> Iterator[None]:
    """A file that is too large, or that ONNX Runtime does not run, is a pipeline that cannot be converted."""
    try:
        yield
    except (ArtifactError, BudgetExceeded) as e:
        raise UnsupportedPipeline(
            f"{type(final(signature.pipeline)).__name__} gives no usable file: {e}"
        ) from e


def _opened(data: bytes) -> Engine:
    """The bytes in the device's engine, after what `publish` will check: before the long part of the proof."""
    check_bytes(data, "the artifact")
    return Engine(data)


def _silent(stage: str, done: int, total: int) -> None:
    del stage, done, total


def _membership(groups: Any, rows: int) -> NDArray[np.str_] | None:
    if groups is None:
        return None
    found = np.asarray([str(value) for value in np.asarray(groups).ravel()])
    if len(found) != rows:
        raise InputError("width", f"groups has {len(found)} values for {rows} rows")
    return found


def _choose(
    subject: Subject, widest: Lowering, parts: _Parts, rows: Probes, told: Progress
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
    return model, _opened(parts.file(model, {})), "float64"


def _disagrees(subject: Subject, parts: _Parts, report: ParityReport, part: Signature) -> bool:
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
    labels, scores = run(engine, rows)
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

"""From a fitted pipeline to one proven ``.onnx`` file."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto

from converters import files
from converters import signature as signatures
from converters import table as tables
from converters.gate import check_bytes, check_static
from converters.onnx_export import Arithmetic, choices, export
from converters.optimize import INPUT, IR_VERSION, LABEL, OPSET, SCORE, to_bytes
from converters.parity import ParityFailure, Progress, compare
from converters.probe_inputs import Probes, rows_in_cells
from converters.reference import CHUNK, Answers, answers, float32_effect
from converters.report import ParityReport
from converters.rewrite import Folded, fold
from converters.signature import Signature
from converters.table import Rows, Table
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ConfigError, ContractError, InputError
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
    progress: Progress | None = None,
) -> Artifact:
    """Converts a fitted pipeline, proves the result against it on hostile rows, and writes one ``.onnx`` file.

    The same arguments give the same bytes. The file is written in one piece at the end, or not at all.

    Args:
        pipeline: a fitted `Pipeline` of scalers and a linear model or forest, or such an estimator alone.
        X: (n, F) training rows, an array or a data frame; they are counted into the reference profile, never stored.
        out: where to write.
        name: the model family, as in topics: lower-case letters, digits and hyphens.
        version: the model's version.
        y: (n,) training targets, for the training digest only.
        groups: (n,) the device, person or site of each row, for one reference profile each.
        probes: about how many rows to compare.
        seed: fixes the rows drawn.
        layout: the cells of the model this one succeeds, so that drift history stays comparable.
        budgets: limits to declare in the manifest.
        progress: called with a stage, how much of it is done, and how much there is.

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
    membership = _membership(groups, len(table.rows))
    wanted = answers(signature, table.rows)
    if not wanted.accepted.all():
        row = int(np.flatnonzero(~wanted.accepted)[0])
        raise InputError("type", f"X: the pipeline refuses row {row} as float32: {wanted.reason}")
    effect = float32_effect(signature, table, wanted)
    spec = _layout(layout, signature, table, wanted)
    parts = _Parts(
        manifest=_manifest(
            signature,
            table,
            spec.layout,
            name=name,
            version=version,
            budgets=budgets,
            digest=tables.training_digest(table, y),
        ),
        spec=spec,
        golden=_golden(signature, table, spec, seed),
    )
    told("fold", 0, 1)
    folded = fold(signature)
    rows = Probes(table.rows, table.missing, spec, folded, probes=probes, seed=seed)
    model, draft, arithmetic = _choose(signature, folded, parts, rows, told)
    report = replace(
        compare(draft, pipeline, rows, progress=told, total=sum(rows.sizes.values())),
        probes=probes,
        seed=seed,
        arithmetic=arithmetic,
        coverage=rows.coverage,
        float32=effect,
    )
    if not report.passed:
        raise ParityFailure(report)
    total, profiles = _profiles(draft, spec, table.rows, membership)
    data = parts.file(model, report.to_certificate(), profiles, total)
    told("write", 0, 1)
    check_bytes(data, str(out))
    engine = Engine(data)
    _check_golden(engine, parts.golden)
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


def _layout(given: CellSpec | None, signature: Signature, table: Table, wanted: Answers) -> CellSpec:
    if given is None:
        return CellSpec(
            features=tuple(cells_from_training(n, table.rows[:, j]) for j, n in enumerate(table.names)),
            score=cells_from_training(signature.score, wanted.scores.max(axis=1).astype(np.float32)),
            classes=len(signature.labels),
        )
    names = tuple(cells.name for cells in given.features)
    if names != table.names or given.classes != len(signature.labels):
        raise ConfigError(
            f"layout {given.layout} has the columns {', '.join(names)} and {given.classes} classes; this pipeline has "
            f"{', '.join(table.names)} and {len(signature.labels)}: leave layout out to start a new one"
        )
    return given


def _manifest(
    signature: Signature,
    table: Table,
    layout: ids.LayoutId,
    *,
    name: str,
    version: str,
    budgets: Budgets,
    digest: Digest,
) -> Manifest:
    if not ids.VERSION.fullmatch(version):
        raise ContractError(f"{version!r} is not a version: it must match {ids.VERSION.pattern}")
    return Manifest(
        name=ids.model_name(name),
        version=version,
        task=signature.task,
        score=signature.score,
        features=tuple(
            Feature(name=n, missing=bool(m)) for n, m in zip(table.names, table.missing, strict=True)
        ),
        labels=signature.labels,
        input_name=INPUT,
        label_output=LABEL if signature.labels else "",
        score_output=SCORE,
        opset=OPSET,
        ir_version=IR_VERSION,
        layout=layout,
        training_digest=digest,
        libraries=tuple((library, metadata.version(library)) for library in _LIBRARIES),
        budgets=budgets,
    )


def _golden(signature: Signature, table: Table, spec: CellSpec, seed: int) -> Golden:
    """Synthetic rows with the pipeline's answers; an eighth of them with missing values where these may occur."""
    count = max(4, min(GOLDEN_ROWS, GOLDEN_BYTES // (4 * len(spec.features))))
    rng = np.random.default_rng([seed, len(spec.features)])
    rows = rows_in_cells(spec, rng, 4 * count)
    holes = table.missing & (rng.random(rows.shape) < 0.5)
    holes[np.arange(len(rows)) % 8 != 0] = False
    rows[holes] = np.nan
    found = answers(signature, rows)
    kept = np.flatnonzero(found.accepted)[:count]
    if not kept.size:
        raise InputError(
            "type", "the pipeline refuses every row drawn from its own training cells; rescale the columns"
        )
    return Golden(rows=rows[kept], labels=found.labels[kept], scores=found.scores[kept])


def _choose(
    signature: Signature, folded: Folded, parts: _Parts, rows: Probes, told: Progress
) -> tuple[ModelProto, Engine, Arithmetic]:
    """The cheapest graph with room to spare: float32 where a first look leaves most of the tolerance unused."""
    *cheaper, exact = choices(signature)
    for done, arithmetic in enumerate(cheaper):
        told("export", done, len(cheaper) + 1)
        model = export(signature, folded, arithmetic)
        engine = Engine(parts.file(model, {}))
        look = compare(engine, signature.pipeline, rows.limited(_FIRST_LOOK))
        if look.passed and look.max_rel_error <= NARROW_SHARE * TOLERANCE:
            return model, engine, arithmetic
        engine.close()
    told("export", len(cheaper), len(cheaper) + 1)
    model = export(signature, folded, exact)
    return model, Engine(parts.file(model, {})), exact


def _profiles(
    engine: Engine, spec: CellSpec, rows: Rows, membership: NDArray[np.str_] | None
) -> tuple[Profile, tuple[tuple[str, Profile], ...]]:
    """Training rows counted as a device counts: with the artifact's own outputs. The total is the sum of the groups."""
    probabilities = engine.info.manifest.probabilities
    labels, scores = engine.run(rows)
    indices = np.zeros(len(rows), np.int64) if labels is None else labels
    if membership is None:
        return _counted(spec, rows, indices, scores, probabilities=probabilities), ()
    groups = []
    for name in sorted(set(membership.tolist())):
        at = np.flatnonzero(membership == name)
        groups.append((name, _counted(spec, rows[at], indices[at], scores[at], probabilities=probabilities)))
    return merge_all(spec, [p for _, p in groups], probabilities=probabilities), tuple(groups)


def _counted(
    spec: CellSpec, rows: Rows, labels: NDArray[np.int64], scores: Rows, *, probabilities: bool
) -> Profile:
    binner = Binner(spec, probabilities=probabilities)
    for start in range(0, len(rows), CHUNK):
        part = slice(start, start + CHUNK)
        binner.observe(rows[part], labels[part], scores[part])
    return binner.take()


def _check_golden(engine: Engine, golden: Golden) -> None:
    labels, scores = engine.run(golden.rows)
    wanted = Answers(labels=golden.labels, scores=golden.scores, accepted=np.ones(len(golden.rows), np.bool_))
    wrong = ~agrees(scores, golden.scores).all(axis=1)
    if labels is not None:
        wrong |= (labels != golden.labels) & ~wanted.ties
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

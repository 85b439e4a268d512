"""What an artifact says before there is a graph: what devices send, the cells they count in, the rows they check."""

from dataclasses import dataclass
from importlib import metadata
from typing import Final, Literal

import numpy as np

from converters.optimize import INPUT, IR_VERSION, LABEL, OPSET, SCORE
from converters.probe_inputs import rows_in_cells
from converters.reference import Acceptance, Answers, Float32Effect, accepted_values, answers, rounding_effect
from converters.signature import Signature
from converters.table import InputDtype, Rows, Table
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError, InputError, UnsupportedPipeline
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import Budgets, Feature, Golden, Manifest
from edge_runtime.contract.profile import CellSpec, category_cells, cells_from_training

GOLDEN_ROWS: Final = 64
GOLDEN_BYTES: Final = 48 * 1024
_LIBRARIES: Final = ("numpy", "onnx", "onnxruntime", "scikit-learn", "skiff-edge", "skl2onnx")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Subject:
    """A pipeline with its training rows as devices send them."""

    signature: Signature
    table: Table
    dtype: InputDtype
    rows: Rows
    answers: Answers
    effect: Float32Effect
    takes: Acceptance
    remedies: tuple[str, ...]


def choose_input(
    signature: Signature, table: Table, wanted: Literal["auto", "float32", "float64"]
) -> Subject:
    """The narrowest input dtype that leaves the pipeline's own answers on the training rows as they are.

    Raises `UnsupportedPipeline` where none does, `InputError` for a training row that the pipeline refuses.
    """
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
            refused = f"X: the pipeline refuses row {row} as {dtype}: {found.reason}"
            if dtype != choices[-1]:
                problems.append(refused)
                continue
            raise InputError("type", refused)
        effect, problem = rounding_effect(signature, table, found, dtype)
        if not problem:
            return Subject(
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


def layout_for(given: CellSpec | None, subject: Subject) -> CellSpec:
    """The cells given, or new ones from the training rows; raises `ConfigError` where they do not fit."""
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


def manifest_for(
    subject: Subject,
    layout: ids.LayoutId,
    *,
    name: str,
    version: str,
    budgets: Budgets,
    digest: Digest,
) -> Manifest:
    """The manifest of the artifact to be; raises `ContractError` when ``version`` is not one."""
    if not ids.VERSION.fullmatch(version):
        raise ContractError(f"{version!r} is not a version: it must match {ids.VERSION.pattern}")
    signature, takes = subject.signature, subject.takes

    no_end = np.full(len(subject.table.columns), np.nan)
    low, high = (no_end, no_end) if takes.limits is None else (takes.limits.low, takes.limits.high)

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
                low=float(low[j]) if np.isfinite(low[j]) else None,
                high=float(high[j]) if np.isfinite(high[j]) else None,
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


def golden_for(subject: Subject, spec: CellSpec, seed: int, *, real_rows: bool) -> Golden:
    """Synthetic rows with the pipeline's answers; an eighth of them with missing values where these may occur.

    With ``real_rows`` the first half are training rows.
    """
    count = max(4, min(GOLDEN_ROWS, GOLDEN_BYTES // (4 * len(spec.features))))
    rng = np.random.default_rng([seed, len(spec.features)])
    sizes = np.array([len(column.vocabulary or ()) for column in subject.table.columns])
    rows = rows_in_cells(spec, rng, 4 * count, sizes, subject.takes, subject.rows.dtype)
    holes = subject.takes.missing & (rng.random(rows.shape) < 0.5)
    holes[np.arange(len(rows)) % 8 != 0] = False
    rows[holes] = np.nan
    rows = np.concatenate([rows, rng.permuted(subject.rows, axis=0)[: 4 * count]])
    if real_rows:
        picked = rng.permutation(len(subject.rows))[: count // 2]
        rows = np.concatenate([subject.rows[picked], rows])
    found = answers(subject.signature, subject.table, rows)
    kept = np.flatnonzero(found.accepted)[:count]
    if not kept.size:
        raise UnsupportedPipeline(
            f"the pipeline refuses every row that is not a training row ({found.reason}); pass real_rows=True, so that "
            "devices can check the artifact with training rows"
        )
    labels = found.labels[kept]
    return Golden(
        rows=rows[kept],
        labels=labels if len(subject.signature.labels) > 1 else labels[:, 0],
        scores=found.scores[kept],
    )

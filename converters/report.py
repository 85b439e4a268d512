"""What a parity check found, as a value, as JSON and as a page to read."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from converters import page
from converters.probe_inputs import SYNTHETIC, Coverage
from converters.reference import Float32Effect
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import Label, Manifest

CERTIFIED_VALUES: Final = 4096
"""About how many numbers of worst rows of single outputs a certificate may hold: metadata is small."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRow:
    """A row with what the artifact and the pipeline say about it; labels are None for a regressor.

    Labels and scores are those of all outputs, or of one, depending on whose worst row it is.
    """

    kind: str
    values: tuple[Label, ...]
    label: Label | None
    expected_label: Label | None
    scores: tuple[float, ...]
    expected_scores: tuple[float, ...]
    abs_error: float
    rel_error: float
    label_differs: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class KindResult:
    """What one kind of probe rows found.

    ``rows`` counts the rows compared; ``refused`` those that the pipeline itself refuses, which are not compared.
    Errors are of scores: absolute, and relative to max(1, abs(reference)). ``worst`` is None where no row was compared.
    """

    rows: int = 0
    refused: int = 0
    ties: int = 0
    label_mismatches: int = 0
    score_mismatches: int = 0
    max_abs_error: float = 0.0
    max_rel_error: float = 0.0
    worst: WorstRow | None = None


def ranges_of(manifest: Manifest) -> Mapping[str, tuple[float | None, float | None]]:
    """The smallest and the largest value of each feature that has a range, None where one is missing."""
    return {feature.name: (feature.low, feature.high) for feature in manifest.features if feature.ranged}


def severity(row: WorstRow) -> tuple[bool, float]:
    """A key that puts the worst row first."""
    return not row.label_differs, -row.rel_error


def merged(results: Iterable[KindResult]) -> KindResult:
    """The figures of several kinds of rows together."""
    found = list(results)
    return KindResult(
        rows=sum(r.rows for r in found),
        refused=sum(r.refused for r in found),
        ties=sum(r.ties for r in found),
        label_mismatches=sum(r.label_mismatches for r in found),
        score_mismatches=sum(r.score_mismatches for r in found),
        max_abs_error=max((r.max_abs_error for r in found), default=0.0),
        max_rel_error=max((r.max_rel_error for r in found), default=0.0),
        worst=min((r.worst for r in found if r.worst is not None), key=severity, default=None),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParityReport:
    """The outcome of comparing an artifact with its pipeline.

    Attributes:
        digest: the file that was compared; empty for a draft that was never written.
        rows: rows compared.
        refused: rows that the pipeline itself refuses, not compared.
        ties: rows whose two best reference scores lie within the tolerance, so that either label is right.
        label_mismatches: rows with a wrong label, ties apart.
        score_mismatches: rows with a score outside the tolerance.
        max_abs_error: largest score error.
        max_rel_error: largest score error relative to max(1, abs(reference)), the figure the tolerance bounds.
        by_probe_kind: the same figures per kind of row.
        by_output: the same figures per kind of row for each of several outputs or targets; empty where there is one.
        worst_rows: the worst first, over all kinds, with at least one of each kind.
        features: column names, in the order of a worst row's values.
        tolerance: the project's, absolute or relative.
        remedies: what conversion did so that the answers agree, the first thing first; empty when nothing was needed.
        notes: what a reader should know of the graph, such as training rows in it.
        coverage: which splits were tried; None without trees.
        float32: what float32 changes on the training rows; None when no training rows were compared.
        real_rows: whether the artifact may carry real rows (golden rows, worst rows), because its maker said so.
        undefined: rows that the pipeline itself answers with NaN.
        ranges: the smallest and the largest value of each feature that has a range: no row outside was compared.
    """

    digest: Digest | None
    rows: int
    refused: int
    ties: int
    label_mismatches: int
    score_mismatches: int
    max_abs_error: float
    max_rel_error: float
    by_probe_kind: Mapping[str, KindResult]
    worst_rows: tuple[WorstRow, ...]
    features: tuple[str, ...]
    tolerance: float
    by_output: tuple[Mapping[str, KindResult], ...] = ()
    probes: int = 0
    seed: int = 0
    arithmetic: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None
    float32: Float32Effect | None = None
    real_rows: bool = False
    undefined: int = 0
    ranges: Mapping[str, tuple[float | None, float | None]] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        """Whether every row compared agrees, and there was one."""
        return self.rows > 0 and not self.label_mismatches and not self.score_mismatches

    def summary(self) -> str:
        """One line: rows, mismatches and the worst error, with its row when the check failed."""
        text = (
            f"{self.rows} rows compared: {self.label_mismatches} wrong labels, {self.score_mismatches} wrong scores, "
            f"{self.ties} ties, worst error {self.max_rel_error:.3g} (tolerance {self.tolerance:g})"
        )
        return (
            text
            if self.passed or not self.worst_rows
            else f"{text}; {_row_text(self.worst_rows[0], self.features)}"
        )

    def to_json(self) -> str:
        """Everything in the report as JSON; values that are not finite become text."""
        return json.dumps(_document(self), indent=2, sort_keys=True)

    def to_certificate(self) -> Mapping[str, object]:
        """Plain data to travel in the artifact: figures to three digits, and the worst of the rows that may travel.

        These are the synthetic ones, or all where ``real_rows`` says so. Ranges stand in the manifest.
        """
        document = _document(self, lambda row: self.real_rows or row.kind in SYNTHETIC, CERTIFIED_VALUES)
        del document["digest"], document["features"], document["ranges"]
        document["worst"] = _first(document["worst"])
        rounded = _rounded(document)
        assert isinstance(rounded, dict)
        return rounded

    def to_html(self, path: str | Path) -> None:
        """Writes the report as one page that needs nothing else."""
        Path(path).write_text(page.render(_document(self)), encoding="utf-8")


def _document(
    report: ParityReport, shown: Callable[[WorstRow], bool] = lambda _: True, room: float = math.inf
) -> dict[str, object]:
    """Plain data, with the worst rows that are ``shown``; ``room`` bounds the numbers in those of the outputs."""
    worst = _of_outputs(report.by_output, shown, room)
    return {
        **_figures(report),
        "passed": report.passed,
        "digest": report.digest or "",
        "tolerance": report.tolerance,
        "probes": report.probes,
        "seed": report.seed,
        "arithmetic": report.arithmetic,
        "real_rows": report.real_rows,
        "remedies": list(report.remedies),
        "notes": list(report.notes),
        "features": list(report.features),
        "ranges": {name: list(ends) for name, ends in report.ranges.items()},
        "kinds": {
            kind: {
                **_figures(result),
                "worst": _row_document(result.worst) if result.worst and shown(result.worst) else None,
            }
            for kind, result in report.by_probe_kind.items()
        },
        "outputs": [
            {"output": k, **_figures(merged(kinds.values())), "worst": row and _row_document(row)}
            for k, (kinds, row) in enumerate(zip(report.by_output, worst, strict=True))
        ],
        "worst": [_row_document(row) for row in report.worst_rows if shown(row)],
        "splits": report.coverage and _coverage_document(report.coverage),
        "float32": report.float32 and _effect_document(report.float32),
    }


def _of_outputs(
    outputs: Sequence[Mapping[str, KindResult]], shown: Callable[[WorstRow], bool], room: float
) -> list[WorstRow | None]:
    """The worst row of each output that is shown, those of the worst outputs first while there is room."""
    found = [
        merged(result for result in kinds.values() if result.worst and shown(result.worst)).worst
        for kinds in outputs
    ]
    for row, k in sorted(((row, k) for k, row in enumerate(found) if row), key=lambda x: severity(x[0])):
        room -= len(row.values) + 2 * len(row.scores)
        if room < 0:
            found[k] = None
    return found


def _coverage_document(coverage: Coverage) -> dict[str, object]:
    return {
        "splits": coverage.splits,
        "distinct": coverage.distinct,
        "reached": coverage.reached,
        "decisive": coverage.decisive,
        "by_offset": {f"{offset:+d}": count for offset, count in coverage.by_offset},
    }


def _effect_document(effect: Float32Effect) -> dict[str, object]:
    return {
        "rows": effect.rows,
        "labels_changed": effect.labels_changed,
        "scores_changed": effect.scores_changed,
        "max_change": _plain(effect.max_change),
    }


def _figures(result: KindResult | ParityReport) -> dict[str, object]:
    return {
        "rows": result.rows,
        "refused": result.refused,
        "ties": result.ties,
        "label_mismatches": result.label_mismatches,
        "score_mismatches": result.score_mismatches,
        "max_abs_error": _plain(result.max_abs_error),
        "max_rel_error": _plain(result.max_rel_error),
    }


def _row_document(row: WorstRow) -> dict[str, object]:
    return {
        "kind": row.kind,
        "values": [_plain(x) for x in row.values],
        "label": row.label,
        "expected_label": row.expected_label,
        "label_differs": row.label_differs,
        "scores": [_plain(x) for x in row.scores],
        "expected_scores": [_plain(x) for x in row.expected_scores],
        "abs_error": _plain(row.abs_error),
        "rel_error": _plain(row.rel_error),
    }


def _first(rows: object) -> list[object]:
    return rows[:1] if isinstance(rows, list) else []


def _plain(value: Label) -> Label:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _cell(value: Label) -> str:
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _rounded(value: object) -> object:
    """Error figures depend on the last bit of the machine's arithmetic; three digits of them do not."""
    if isinstance(value, dict):
        return {
            key: float(f"{item:.3g}")
            if isinstance(item, float) and key.startswith("max_")
            else _rounded(item)
            for key, item in value.items()
        }
    return [_rounded(item) for item in value] if isinstance(value, list) else value


def _row_text(row: WorstRow, features: Sequence[str]) -> str:
    shown = ", ".join(f"{name}={_cell(value)}" for name, value in zip(features[:8], row.values, strict=False))
    more = ", …" if len(features) > 8 else ""
    labels = f"label {row.label!r} for {row.expected_label!r}, " if row.label_differs else ""
    found = ", ".join(f"{x:.7g}" for x in row.scores[:8])
    wanted = ", ".join(f"{x:.7g}" for x in row.expected_scores[:8])
    return f"worst row ({row.kind}): {labels}scores [{found}] for [{wanted}] at {shown}{more}"

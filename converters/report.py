"""What a parity check found, as a value, as JSON and as a page to read."""

import html
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from converters.probe_inputs import SYNTHETIC, Coverage
from converters.reference import Float32Effect
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import Label

_STYLE: Final = """
body{font:15px/1.5 system-ui,sans-serif;max-width:64rem;margin:2rem auto;padding:0 1rem;color:#1b1f23;background:#fff}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}td,th{padding:.25rem .75rem;border-bottom:1px solid #d0d7de}
th{text-align:left}td.n{text-align:right;font-variant-numeric:tabular-nums}code{word-break:break-all}
.pass{color:#116329}.fail{color:#a40e26}
@media(prefers-color-scheme:dark){body{color:#e6edf3;background:#0d1117}td,th{border-color:#30363d}
.pass{color:#7ee787}.fail{color:#ff7b72}}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class KindResult:
    """What one kind of probe rows found.

    ``rows`` counts the rows compared; ``refused`` those that the pipeline itself refuses, which are not compared.
    Errors are of scores: absolute, and relative to max(1, abs(reference)).
    """

    rows: int
    refused: int
    ties: int
    label_mismatches: int
    score_mismatches: int
    max_abs_error: float
    max_rel_error: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorstRow:
    """A row with what the artifact and the pipeline say about it; labels are None for a regressor."""

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
        worst_rows: the worst first, over all kinds.
        features: column names, in the order of a worst row's values.
        tolerance: the project's, absolute or relative.
        remedies: what conversion did so that the answers agree, the first thing first; empty when nothing was needed.
        notes: what a reader should know of the graph, such as training rows in it.
        coverage: which splits were tried; None without trees.
        float32: what float32 changes on the training rows; None when no training rows were compared.
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
    probes: int = 0
    seed: int = 0
    arithmetic: str = ""
    remedies: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None
    float32: Float32Effect | None = None

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
        return json.dumps(_document(self, self.worst_rows), indent=2, sort_keys=True)

    def to_certificate(self) -> Mapping[str, object]:
        """Plain data to travel in the artifact: figures to three digits, and the worst of the synthetic rows only."""
        document = _document(self, [row for row in self.worst_rows if row.kind in SYNTHETIC][:1])
        del document["digest"], document["features"]
        rounded = _rounded(document)
        assert isinstance(rounded, dict)
        return rounded

    def to_html(self, path: str | Path) -> None:
        """Writes the report as one page that needs nothing else."""
        Path(path).write_text(_page(self), encoding="utf-8")


def _document(report: ParityReport, worst: Sequence[WorstRow]) -> dict[str, object]:
    coverage, effect = report.coverage, report.float32
    return {
        "passed": report.passed,
        "digest": report.digest or "",
        "rows": report.rows,
        "refused": report.refused,
        "ties": report.ties,
        "label_mismatches": report.label_mismatches,
        "score_mismatches": report.score_mismatches,
        "max_abs_error": _plain(report.max_abs_error),
        "max_rel_error": _plain(report.max_rel_error),
        "tolerance": report.tolerance,
        "probes": report.probes,
        "seed": report.seed,
        "arithmetic": report.arithmetic,
        "remedies": list(report.remedies),
        "notes": list(report.notes),
        "features": list(report.features),
        "kinds": {kind: _kind_document(result) for kind, result in report.by_probe_kind.items()},
        "worst": [_row_document(row) for row in worst],
        "splits": None
        if coverage is None
        else {
            "splits": coverage.splits,
            "distinct": coverage.distinct,
            "reached": coverage.reached,
            "decisive": coverage.decisive,
            "by_offset": {f"{offset:+d}": count for offset, count in coverage.by_offset},
        },
        "float32": None
        if effect is None
        else {
            "rows": effect.rows,
            "labels_changed": effect.labels_changed,
            "scores_changed": effect.scores_changed,
            "max_change": _plain(effect.max_change),
        },
    }


def _kind_document(result: KindResult) -> dict[str, object]:
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


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cell(value: object) -> str:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        shown = (
            f"{value:.3g}"
            if isinstance(value, float)
            else f"{value:,}"
            if isinstance(value, int)
            else str(value)
        )
        return f"<td{' class=n' if number else ''}>{html.escape(shown)}</td>"

    titles = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "".join(f"<tr>{''.join(cell(value) for value in row)}</tr>\n" for row in rows)
    return f"<table><thead><tr>{titles}</tr></thead>\n<tbody>\n{body}</tbody></table>\n"


def _page(report: ParityReport) -> str:
    verdict, style = ("passed", "pass") if report.passed else ("failed", "fail")
    kinds = [
        [
            k,
            r.rows,
            r.label_mismatches,
            r.score_mismatches,
            r.ties,
            r.refused,
            r.max_abs_error,
            r.max_rel_error,
        ]
        for k, r in report.by_probe_kind.items()
    ]
    facts: list[list[object]] = [
        ["rows compared", report.rows],
        ["wrong labels", report.label_mismatches],
        ["wrong scores", report.score_mismatches],
        ["ties (either label is right)", report.ties],
        ["rows the pipeline refuses", report.refused],
        ["largest absolute error", report.max_abs_error],
        ["largest error relative to max(1, |reference|)", report.max_rel_error],
        ["tolerance", f"{report.tolerance:g}"],
        ["arithmetic in the graph", report.arithmetic or "unknown"],
        ["seed", report.seed],
    ]
    facts += [["remedy", text] for text in report.remedies]
    facts += [["note", text] for text in report.notes]
    if report.coverage is not None:
        c = report.coverage
        offsets = ", ".join(f"{count:,} rows at {offset:+d}" for offset, count in c.by_offset)
        facts += [
            ["splits", f"{c.splits:,} with {c.distinct:,} distinct thresholds"],
            ["splits reached by their threshold rows", f"{c.reached:,}, {c.decisive:,} of them decisively"],
            ["threshold rows by distance in float32 values", offsets],
        ]
    if report.float32 is not None:
        e = report.float32
        figures = f"{e.labels_changed:,} labels and {e.scores_changed:,} scores of {e.rows:,}"
        facts.append(["training rows that float32 changes", f"{figures}, by up to {e.max_change:.3g}"])
    worst = [
        [
            row.kind,
            "" if row.label is None else repr(row.label),
            "" if row.expected_label is None else repr(row.expected_label),
            row.abs_error,
            row.rel_error,
            " ".join(f"{x:.7g}" for x in row.scores),
            " ".join(f"{x:.7g}" for x in row.expected_scores),
            " ".join(map(_cell, row.values)),
        ]
        for row in report.worst_rows
    ]
    kind_head = (
        "kind",
        "rows",
        "wrong labels",
        "wrong scores",
        "ties",
        "refused",
        "largest error",
        "relative",
    )
    worst_head = ("kind", "label", "expected", "error", "relative", "scores", "expected scores", "row")
    return (
        "<!doctype html>\n<html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>Parity {verdict}</title><style>{_STYLE}</style>\n"
        f"<h1>Parity <span class={style}>{verdict}</span></h1>\n<p><code>{report.digest or ''}</code></p>\n"
        f"{_table(('what', 'figure'), facts)}<h2>By kind of row</h2>\n{_table(kind_head, kinds)}"
        f"<h2>Worst rows</h2>\n<p>Columns: {html.escape(', '.join(report.features))}</p>\n"
        f"{_table(worst_head, worst)}</html>\n"
    )

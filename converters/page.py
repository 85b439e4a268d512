"""A parity report as one HTML page that needs nothing else: no script, no network, readable on a telephone."""

import html
from collections.abc import Mapping, Sequence
from typing import Any, Final

_STYLE: Final = """
:root{--ink:#1b1f23;--soft:#57606a;--line:#d8dee4;--card:#fff;--back:#f6f8fa;--good:#116329;--good-back:#dafbe1;
--bad:#a40e26;--bad-back:#ffebe9}
@media(prefers-color-scheme:dark){:root{--ink:#e6edf3;--soft:#9198a1;--line:#30363d;--card:#161b22;--back:#0d1117;
--good:#7ee787;--good-back:#12261e;--bad:#ff7b72;--bad-back:#2d1417}}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;margin:0;color:var(--ink);background:var(--back)}
main{max-width:66rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0}h2{font-size:1.1rem;margin:0 0 .5rem}p{margin:0 0 .5rem}
.soft{color:var(--soft)}code{overflow-wrap:anywhere;color:var(--soft)}
.pass,.fail{padding:.1rem .6rem;border-radius:1rem}
.pass{color:var(--good);background:var(--good-back)}.fail{color:var(--bad);background:var(--bad-back)}
section{background:var(--card);border:1px solid var(--line);border-radius:8px;padding:1rem;margin:1rem 0}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%}td,th{padding:.3rem .75rem .3rem 0;border-bottom:1px solid var(--line)}
tr:last-child td{border-bottom:0}th{text-align:left;color:var(--soft);font-weight:600;vertical-align:bottom}
td{vertical-align:top}td small{display:block;color:var(--soft);min-width:12rem}
.n{text-align:right;font-variant-numeric:tabular-nums;white-space:nowrap}tr.together td{font-weight:600}
.bad{color:var(--bad);font-weight:600}
dl{display:grid;grid-template-columns:minmax(7rem,max-content) 1fr;gap:.25rem 1.25rem;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}ul{margin:0;padding-left:1.2rem;overflow-wrap:anywhere}
details{border-top:1px solid var(--line);padding:.5rem 0}details:first-of-type{border-top:0}
summary{cursor:pointer;overflow-wrap:anywhere}
.values{display:grid;grid-template-columns:repeat(auto-fill,minmax(9.5rem,1fr));gap:.4rem .9rem;margin:.5rem 0 .25rem}
@media(max-width:40rem){td small{display:none}th.n{white-space:normal}td,th{padding-right:.5rem}}
.values div{overflow-wrap:anywhere;font-variant-numeric:tabular-nums}.values span{display:block;color:var(--soft);
font-size:.8rem;line-height:1.3}
"""

_MEANING: Final = {
    "training": "the training rows themselves",
    "random": "synthetic rows, drawn from the cells",
    "threshold": "on and beside every split of the trees",
    "edge": "around the edges of bins, categories and clips",
    "boundary": "on both sides of where the answer changes",
    "extreme": "at the ends of a column, beyond them, next to zero",
    "huge": "near the end of float32",
    "integer": "round numbers",
    "missing": "with missing values",
    "infinite": "with infinities",
    "category": "every category, and values not seen before",
    "limit": "at the ends of the declared ranges",
    "batch": "also alone and in batches of several sizes",
}
_FIGURES: Final = (
    "rows",
    "wrong labels",
    "wrong scores",
    "ties",
    "refused",
    "largest error",
    "relative",
)
_LABELS_SHOWN: Final = 12


def render(document: Mapping[str, Any]) -> str:
    """The page of a report's document, as `converters.report.ParityReport.to_json` gives it."""
    verdict, style = ("passed", "pass") if document["passed"] else ("failed", "fail")
    outputs = [(f"output {o['output']}", "", o) for o in document["outputs"]]
    kinds = [(kind, _MEANING.get(kind, ""), figures) for kind, figures in document["kinds"].items()]
    sections = (
        _section("What was found", _facts(document)),
        _section("Remedies", _list(document["remedies"])),
        _section("Notes", _list(document["notes"])),
        _section("Ranges", _ranges(document["ranges"])),
        _section("By kind of row", _figures("kind", kinds, document)),
        _section("By output", _figures("output", outputs, document) if outputs else ""),
        _section("Worst rows", _worst(document["worst"], document["features"], document["tolerance"])),
        _section(
            "Worst row of each output",
            "".join(
                _row(o["worst"], document["features"], document["tolerance"], f"output {o['output']}: ")
                for o in document["outputs"]
                if o["worst"]
            ),
        ),
    )
    return (
        "<!doctype html>\n<html lang=en><head><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width,initial-scale=1'>"
        f"<title>Parity {verdict}</title><style>{_STYLE}</style></head>\n<body><main>\n"
        f"<h1>Parity <span class={style}>{verdict}</span></h1>\n{_lead(document)}"
        f"{''.join(sections)}</main></body></html>\n"
    )


def _lead(document: Mapping[str, Any]) -> str:
    text = (
        f"{document['rows']:,} rows compared: {document['label_mismatches']:,} wrong labels and "
        f"{document['score_mismatches']:,} wrong scores; the worst error is {_number(document['max_rel_error'])} of an "
        f"allowed {document['tolerance']:g}."
    )
    digest = f"<p><code>{html.escape(document['digest'])}</code></p>\n" if document["digest"] else ""
    return f"<p>{text}</p>\n{digest}"


def _section(title: str, body: str) -> str:
    return f"<section><h2>{html.escape(title)}</h2>\n{body}</section>\n" if body else ""


def _list(texts: Sequence[str]) -> str:
    items = "".join(f"<li>{html.escape(text)}</li>\n" for text in texts)
    return f"<ul>{items}</ul>\n" if items else ""


def _ranges(found: Mapping[str, Sequence[float | None]]) -> str:
    if not found:
        return ""
    cells = [
        (name, "…".join("" if end is None else f"{end:.9g}" for end in ends)) for name, ends in found.items()
    ]
    return f"<p>No row outside was compared: devices refuse them.</p>\n{_texts(cells)}"


def _facts(document: Mapping[str, Any]) -> str:
    facts = [
        ("ties", f"{document['ties']:,} rows on which either label is right"),
        ("refused", f"{document['refused']:,} rows that the pipeline itself refuses; they are not compared"),
        ("absolute error", f"{_number(document['max_abs_error'])} at most"),
        ("relative error", f"{_number(document['max_rel_error'])} at most, relative to max(1, |reference|)"),
        ("tolerance", f"{document['tolerance']:g}, absolute or relative"),
        ("arithmetic", document["arithmetic"] or "unknown"),
        ("seed", str(document["seed"])),
        ("real rows", "may travel in the artifact" if document["real_rows"] else "none in the certificate"),
    ]
    if splits := document["splits"]:
        offsets = ", ".join(f"{count:,} rows at {offset}" for offset, count in splits["by_offset"].items())
        facts += [
            ("splits", f"{splits['splits']:,} with {splits['distinct']:,} distinct thresholds"),
            ("reached", f"{splits['reached']:,}, {splits['decisive']:,} of them decisively"),
            ("threshold rows", f"{offsets}, counted in floating-point values from the threshold"),
        ]
    if effect := document["float32"]:
        changed = f"{effect['labels_changed']:,} labels and {effect['scores_changed']:,} scores"
        most = _number(effect["max_change"])
        facts.append(
            ("rounding", f"changes {changed} of {effect['rows']:,} training rows, by up to {most}"),
        )
    items = "".join(f"<dt>{html.escape(what)}</dt><dd>{html.escape(text)}</dd>\n" for what, text in facts)
    return f"<dl>{items}</dl>\n"


def _figures(
    what: str, rows: Sequence[tuple[str, str, Mapping[str, Any]]], together: Mapping[str, Any]
) -> str:
    head = "".join(f"<th class=n>{name}</th>" for name in _FIGURES)
    body = "".join(_line(name, meaning, figures) for name, meaning, figures in rows)
    last = _line("together", "", together, " class=together") if len(rows) > 1 else ""
    return (
        f"<div class=scroll><table><thead><tr><th>{what}</th>{head}</tr></thead>\n"
        f"<tbody>{body}{last}</tbody></table></div>\n"
    )


def _line(name: str, meaning: str, figures: Mapping[str, Any], style: str = "") -> str:
    small = f"<small>{html.escape(meaning)}</small>" if meaning else ""
    cells = [f"<td>{html.escape(name)}{small}</td>", f"<td class=n>{figures['rows']:,}</td>"]
    for key in ("label_mismatches", "score_mismatches"):
        wrong = " bad" if figures[key] else ""
        cells.append(f"<td class='n{wrong}'>{figures[key]:,}</td>")
    cells += [f"<td class=n>{figures[key]:,}</td>" for key in ("ties", "refused")]
    cells += [f"<td class=n>{_number(figures[key])}</td>" for key in ("max_abs_error", "max_rel_error")]
    return f"<tr{style}>{''.join(cells)}</tr>\n"


def _worst(rows: Sequence[Mapping[str, Any]], features: Sequence[str], tolerance: float) -> str:
    return "".join(_row(row, features, tolerance, "", opened=not i) for i, row in enumerate(rows))


def _row(
    row: Mapping[str, Any], features: Sequence[str], tolerance: float, name: str, *, opened: bool = False
) -> str:
    labels = row["label"] is not None
    wrong = row["label_differs"] or isinstance(row["rel_error"], str) or row["rel_error"] > tolerance
    verdict = "<span class=bad>disagrees</span>" if wrong else "agrees"
    said = f", label {html.escape(repr(row['label']))}" if labels else ""
    if row["label_differs"]:
        said += f" <span class=bad>for {html.escape(repr(row['expected_label']))}</span>"
    pairs = [(f"artifact {i}", value) for i, value in enumerate(row["scores"][:_LABELS_SHOWN])]
    wanted = [(f"pipeline {i}", value) for i, value in enumerate(row["expected_scores"][:_LABELS_SHOWN])]
    both = [pair for each in zip(pairs, wanted, strict=False) for pair in each]
    more = len(row["scores"]) - _LABELS_SHOWN
    rest = f"<p class=soft>and {more} more scores</p>" if more > 0 else ""
    return (
        f"<details{' open' if opened else ''}><summary>{html.escape(name)}{html.escape(row['kind'])}: {verdict}, error "
        f"{_number(row['abs_error'])} ({_number(row['rel_error'])} relative){said}</summary>\n"
        f"<p class=soft>Scores</p>{_grid(both)}{rest}"
        f"<p class=soft>Row</p>{_grid(list(zip(features, row['values'], strict=False)))}</details>\n"
    )


def _grid(pairs: Sequence[tuple[str, object]]) -> str:
    return _texts([(name, _value(value)) for name, value in pairs])


def _texts(pairs: Sequence[tuple[str, str]]) -> str:
    cells = "".join(f"<div><span>{html.escape(name)}</span>{html.escape(text)}</div>" for name, text in pairs)
    return f"<div class=values>{cells}</div>\n"


def _value(value: object) -> str:
    """A cell; numbers that are not finite arrive as text."""
    if isinstance(value, str):
        return value if value in ("nan", "inf", "-inf") else repr(value)
    return f"{value:.9g}" if isinstance(value, float) else repr(value)


def _number(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)

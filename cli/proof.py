"""How commands show what was proven: tables for a person, plain data for a machine."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from rich import box
from rich.table import Table

from cli.output import out, print_json
from converters import ParityReport

_OUTPUTS_SHOWN: Final = 20


def certificate_table(certificate: Mapping[str, Any], *, relative: bool = False) -> Table:
    """What was proven, as a table: one row per kind of probe, with the worst ``relative`` error where wanted."""
    table = _table("probe rows", relative=relative)
    for kind, found in certificate["kinds"].items():
        table.add_row(*_proof_row(kind.replace("_", " "), found, relative=relative))
    table.add_section()
    table.add_row(*_proof_row("together", certificate, relative=relative), style="bold")
    return table


def outputs_table(outputs: list[Mapping[str, Any]]) -> Table:
    """What was proven of each of several outputs; where they are many, of the worst."""
    table = _table("output", relative=True)
    worst = sorted(outputs, key=lambda o: (-o["label_mismatches"], -float(o["max_rel_error"])))
    shown = sorted(o["output"] for o in worst[:_OUTPUTS_SHOWN])
    for k in shown:
        table.add_row(*_proof_row(str(k), outputs[k], relative=True))
    if len(outputs) > len(shown):
        table.caption = f"the worst {len(shown)} of {len(outputs)} outputs; --json shows all"
    return table


def tell_certificate(certificate: Mapping[str, Any]) -> None:
    """Prints the tables, the remedies and the notes of a certificate or a report's document."""
    out.print(certificate_table(certificate, relative=True))
    if outputs := certificate.get("outputs"):
        out.print(outputs_table(outputs))
    for what in ("remedies", "notes"):
        for text in certificate.get(what, ()):
            out.print(f"{'remedy' if what == 'remedies' else 'note'}: {text}", markup=False)
    if certificate.get("real_rows"):
        out.print("note: the artifact carries training rows (golden rows, worst rows)", markup=False)


def tell_report(report: ParityReport, *, as_json: bool, html: Path | None, **facts: object) -> None:
    """Shows a report as a person or a machine wants it; ``facts`` go beside it, for a machine."""
    if html is not None:
        report.to_html(html)
    if as_json:
        print_json({**json.loads(report.to_json()), **facts})
        return
    tell_certificate(json.loads(report.to_json()))
    out.print(report.summary(), markup=False)


def _table(first: str, *, relative: bool) -> Table:
    last = ("relative",) if relative else ()
    table = Table(
        first,
        "compared",
        "wrong labels",
        "wrong scores",
        "ties",
        "worst error",
        *last,
        box=box.SIMPLE,
        pad_edge=False,
    )
    for column in table.columns[1:]:
        column.justify = "right"
    return table


def _proof_row(name: str, found: Mapping[str, Any], *, relative: bool) -> tuple[str, ...]:
    last = (f"{float(found['max_rel_error']):.1e}",) if relative else ()
    return (
        name,
        f"{found['rows']:,}",
        str(found["label_mismatches"]),
        str(found["score_mismatches"]),
        str(found["ties"]),
        f"{float(found['max_abs_error']):.1e}",
        *last,
    )

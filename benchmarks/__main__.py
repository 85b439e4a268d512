"""Runs every benchmark and prints its table."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import (
    budgets,
    calibration,
    calibration_text,
    closing,
    conversion,
    device,
    drift_peers,
    ingest,
    judging,
    merging,
    predict,
    shadow_cost,
    swaps,
    update,
    update_agent,
    window,
)

_CONVERSION = (
    "pipeline",
    "convert s",
    "prove s",
    "probes",
    "skl2onnx s",
    "file kB",
    "graph kB",
    "plain kB",
    "skiff's answers",
    "plain's answers",
)
_LATENCY = (
    "pipeline",
    "engine us",
    "graph us",
    "plain us",
    "sklearn us",
    *(f"{a}/{b}" for a, b in conversion.RATIOS),
)
_SINGLE = (
    "model",
    "runtime p50 us",
    "bare p50 us",
    "script p50 us",
    "runtime / bare",
    "runtime / script",
    "runtime p99/p50",
    "bare p99/p50",
    "mapping adds us",
    "list adds us",
)
_BATCHES = ("model", "256 rows / bare", "256 rows, binned too / bare", "binning us/row")


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--swaps", type=int, default=1_000, help="how many models are swapped under load")
    parser.add_argument(
        "--predictions", type=int, default=1_000_000, help="how many rows meanwhile, at least"
    )
    parser.add_argument(
        "--drift-peers",
        action="store_true",
        help="install and measure the drift peers, too: gigabytes, an hour",
    )
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {"conversion": conversion.run(told=_tell)}
    _show(found["conversion"], _CONVERSION, _LATENCY)
    found["predict"] = predict.run()
    _show(found["predict"], _SINGLE, _BATCHES)
    found["swaps"] = swaps.run(swaps=given.swaps, predictions=given.predictions)
    print("\n".join(f"{head:36} {value}" for head, value in found["swaps"].items()), end="\n\n")
    found["window"] = window.run()
    _show(found["window"])
    for name, run in (
        ("device", device.run),
        ("closing", closing.run),
        ("update", update.run),
        ("update agent", update_agent.run),
        ("shadow", shadow_cost.run),
        ("ingest", ingest.run),
        ("judging", judging.run),
        ("merging", merging.run),
    ):
        _tell(name)
        found[name] = run()
        _show(found[name])
    found["budgets"] = budgets.run(found["device"], found["update"], found["window"])
    _show(found["budgets"])
    _tell("calibration")
    found["calibration"] = calibration.run()
    print(calibration_text.markdown(found["calibration"]), end="\n\n")
    if given.drift_peers:
        found["drift_peers"] = drift_peers.run()
        print(drift_peers.markdown(found["drift_peers"]), end="\n\n")
    if given.json:
        figures = {"machine": platform.platform(), "python": platform.python_version(), **found}
        given.json.write_text(json.dumps(figures, indent=2, default=asdict) + "\n", encoding="utf-8")
    return 0


def _tell(what: str) -> None:
    print(f"... {what}", file=sys.stderr)


def _show(rows: Sequence[dict[str, Any]], *heads: Sequence[str]) -> None:
    """Prints ``rows`` once for each selection of columns, or whole."""
    for columns in heads or (tuple(rows[0]) if rows else (),):
        print("\n".join(table(rows, columns)), end="\n\n")


def table(rows: Sequence[dict[str, Any]], heads: Sequence[str]) -> list[str]:
    """Lines of text: the columns ``heads`` of ``rows``, with a dash where a row has no figure."""
    cells = [list(heads), *([str(row.get(head, "-")) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]


if __name__ == "__main__":
    sys.exit(main())

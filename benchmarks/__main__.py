"""Runs every benchmark and prints its table."""

import argparse
import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import conversion, predict

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    given = parser.parse_args(arguments)
    converted = conversion.run(told=lambda name: print(f"... {name}", file=sys.stderr))
    print("\n".join(table(converted, _CONVERSION)), end="\n\n")
    print("\n".join(table(converted, _LATENCY)), end="\n\n")
    predicted = predict.run()
    print("\n".join(table(predicted, tuple(predicted[0]))))
    if given.json:
        figures = {
            "machine": platform.platform(),
            "python": platform.python_version(),
            "conversion": converted,
            "predict": predicted,
        }
        given.json.write_text(json.dumps(figures, indent=2, default=asdict) + "\n", encoding="utf-8")
    return 0


def table(rows: Sequence[dict[str, Any]], heads: Sequence[str]) -> list[str]:
    """Lines of text: the columns ``heads`` of ``rows``, with a dash where a row has no figure."""
    cells = [list(heads), *([str(row.get(head, "-")) for head in heads] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in cells]


if __name__ == "__main__":
    sys.exit(main())

"""Runs every benchmark and prints its table."""

import argparse
import json
import platform
import sys
from pathlib import Path

from benchmarks import predict


def main() -> int:
    """Entry point of ``python -m benchmarks``."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    arguments = parser.parse_args()
    figures = {"machine": platform.platform(), "python": platform.python_version(), "predict": predict.run()}
    for row in predict_rows(figures["predict"]):
        sys.stdout.write(row + "\n")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return 0


def predict_rows(rows: object) -> list[str]:
    """The table as lines of text."""
    assert isinstance(rows, list)
    heads = list(rows[0])
    table = [heads, *([str(row[h]) for h in heads] for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(heads))]
    return ["  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in table]


if __name__ == "__main__":
    sys.exit(main())

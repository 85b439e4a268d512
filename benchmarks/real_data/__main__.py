"""What `skiff backtest` says about recorded rows of which it is known what changed.

python -m benchmarks.real_data [--only NAME] [--json FILE] [--docs] [--keep FOLDER]
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.real_data import report
from benchmarks.real_data.cases import CASES, Case, Workshop


def run(folder: Path, cases: Sequence[Case] = CASES) -> list[dict[str, Any]]:
    """A row for each case; converted models and rows stay in ``folder``."""
    shop, found = Workshop(folder), []
    for case in cases:
        print(f"... {case.name}", file=sys.stderr)
        found.append(report.row(case, shop.run(case)))
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point of ``python -m benchmarks.real_data``."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.real_data", description=__doc__.partition("\n")[0]
    )
    parser.add_argument(
        "--only", action="append", choices=[case.name for case in CASES], help="this case alone"
    )
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--docs", action="store_true", help=f"write the table into {report.PAGE.name}, too")
    parser.add_argument("--keep", type=Path, help="leave models and rows in this folder")
    given = parser.parse_args(arguments)
    cases = [case for case in CASES if given.only is None or case.name in given.only]
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows = run(folder, cases)
    print(report.markdown(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if given.docs:
        report.write(rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

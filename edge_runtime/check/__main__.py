"""``python -m edge_runtime.check CONFIG.toml``: as ``skiffd --check``, also where ONNX Runtime cannot be loaded."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from edge_runtime import check
from edge_runtime.config import load
from edge_runtime.contract.errors import ConfigError


def main(argv: Sequence[str] | None = None) -> int:
    """0: nothing is wrong; 1: something is; 2: the configuration cannot be read."""
    parser = argparse.ArgumentParser(prog="python -m edge_runtime.check", description=check.__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--json", action="store_true", help="print one JSON list")
    parser.add_argument("--offline", action="store_true", help="ask no broker")
    arguments = parser.parse_args(argv)
    try:
        config = load(arguments.config)
    except ConfigError as e:
        sys.stderr.write(f"skiffd: {e}\n")
        return 2
    return check.main(config, as_json=arguments.json, offline=arguments.offline)


if __name__ == "__main__":
    sys.exit(main())

"""The arrows between packages, checked by import-linter as `make lint` does, and shown to bite."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGES = ("edge_runtime", "converters", "trainer", "aggregator", "cli")
ENTRY = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


def lint_imports(folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", ENTRY, "--no-cache", "--no-logo", "--config", "pyproject.toml"],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_contract_holds(repository):
    done = lint_imports(repository)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


@pytest.mark.parametrize(
    ("module", "line", "contract"),
    [
        ("edge_runtime/core/agent.py", "import trainer", "Packages:"),
        ("edge_runtime/core/agent.py", "import edge_runtime.adapters.slots", "Device:"),
        ("edge_runtime/adapters/slots.py", "import edge_runtime.core.agent", "Device:"),
        ("edge_runtime/daemon.py", "import edge_runtime.updater", "Device:"),
        ("edge_runtime/runtime.py", "import onnxruntime", "onnxruntime:"),
        ("edge_runtime/core/windowing.py", "import time", "Cores have no clock"),
        ("edge_runtime/config/__init__.py", "import pydantic", "The device loads no training"),
        ("trainer/fit.py", "import edge_runtime.engine", "The trainer knows the device"),
        ("aggregator/core/drift.py", "import aggregator.adapters.ledger", "Aggregator:"),
        ("converters/parity.py", "from rich import table", "typer and rich"),
    ],
)
def test_a_forbidden_import_is_caught(repository, tmp_path, module, line, contract):
    for package in PACKAGES:
        shutil.copytree(
            repository / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__", "data")
        )
    shutil.copy(repository / "pyproject.toml", tmp_path)
    with (tmp_path / module).open("a", encoding="utf-8") as source:
        source.write(f"\n{line}\n")
    done = lint_imports(tmp_path)
    assert done.returncode != 0, done.stdout
    broken = " ".join(done.stdout.partition("Broken contracts")[2].split())
    assert contract in broken, done.stdout + done.stderr

"""What a fresh interpreter has loaded after an import. Every megabyte here is paid on every device."""

import json
import subprocess
import sys

import pytest

NEVER_ON_A_DEVICE = frozenset(
    {
        "asyncio",
        "cryptography",
        "joblib",
        "matplotlib",
        "onnx",
        "prometheus_client",
        "psycopg",
        "pydantic",
        "rich",
        "scipy",
        "securesystemslib",
        "skl2onnx",
        "sklearn",
        "sqlalchemy",
        "starlette",
        "tuf",
        "typer",
        "uvicorn",
    }
)
CONTRACT = (
    "codec",
    "errors",
    "fields",
    "ids",
    "latency",
    "manifest",
    "messages",
    "profile",
    "release",
    "topics",
)


def loaded_by(*modules: str) -> frozenset[str]:
    """Top-level names in `sys.modules` after importing ``modules``, without this process's path or environment."""
    script = f"import json, sys, {', '.join(modules)}; print(json.dumps(list(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    return frozenset(name.partition(".")[0] for name in json.loads(done.stdout))


FIRST_ANSWER = ("edge_runtime.skiffd", "edge_runtime.daemon", "edge_runtime.adapters.sources.stdio")
DAEMON = (*FIRST_ANSWER, "edge_runtime.uplink", "edge_runtime.adapters.status_socket")
"""With what it loads once a model serves."""


@pytest.mark.parametrize("modules", [("edge_runtime.runtime",), DAEMON])
def test_the_device_stays_below_its_import_ceiling(modules):
    loaded = loaded_by(*modules)
    assert "onnxruntime" in loaded, "the probe looked at the wrong process: no engine was loaded"
    assert not loaded & NEVER_ON_A_DEVICE


def test_the_contract_loads_neither_engine_nor_link():
    loaded = loaded_by(*(f"edge_runtime.contract.{name}" for name in CONTRACT))
    assert "numpy" in loaded
    assert not loaded & (NEVER_ON_A_DEVICE | {"onnxruntime", "paho", "psutil", "sqlite3"})


def test_the_version_costs_nothing():
    before = loaded_by("json")
    assert loaded_by("edge_runtime") - before == {"edge_runtime"}


UNUSED = {"argparse", "difflib", "email", "http", "psutil", "subprocess", "zipfile"}
"""Half a megabyte to a megabyte each, for what a device that serves does not need, or seldom."""


def test_the_daemon_loads_what_it_seldom_needs_when_it_needs_it():
    assert not loaded_by(*DAEMON) & UNUSED


def test_the_first_row_is_answered_without_what_only_the_link_needs():
    link = {"paho", "ssl"}
    assert link <= loaded_by(*DAEMON)
    assert not loaded_by(*FIRST_ANSWER) & link


def test_what_paho_was_spared_is_whole_for_others():
    script = "import edge_runtime.link, urllib.request; print(urllib.request.Request('http://x/').host)"
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout == "x\n"

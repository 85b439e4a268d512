"""Every shipped device configuration loads, in the checkout as in an installed package."""

from importlib.resources import files
from pathlib import Path

import pytest

from edge_runtime.config import DaemonConfig, load

FOLDER = Path(__file__).resolve().parents[2] / "device_configs"
CONFIGS = sorted(FOLDER.glob("*.toml"))


def test_there_are_device_configs():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_device_config_loads(path):
    assert isinstance(load(path), DaemonConfig)


def test_an_installed_skiff_finds_them():
    shipped = {entry.name for entry in files("device_configs").iterdir() if entry.name.endswith(".toml")}
    assert shipped == {path.name for path in CONFIGS}

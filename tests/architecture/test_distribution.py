"""What an installed skiff consists of: a wheel is built, looked into and imported from."""

import configparser
import json
import subprocess
import sys
import zipfile

import pytest

PACKAGES = {"edge_runtime", "converters", "trainer", "aggregator", "cli"}


@pytest.fixture(scope="module")
def wheel(repository, tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    done = subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=repository,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    with zipfile.ZipFile(built) as archive:
        yield archive


def test_it_holds_the_packages_and_nothing_else(wheel):
    top = {name.partition("/")[0] for name in wheel.namelist()}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES | {"device_configs"}
    assert not [name for name in wheel.namelist() if "__pycache__" in name or "test_" in name]


def test_every_package_is_marked_as_typed(wheel):
    assert {f"{package}/py.typed" for package in PACKAGES} <= set(wheel.namelist())


def test_data_travels_with_the_code(wheel, repository):
    names = set(wheel.namelist())
    data = [
        path
        for path in (repository / "trainer" / "data").rglob("*")
        if path.suffix in {".npz", ".csv", ".json"}
    ]
    configs = [path for path in (repository / "device_configs").iterdir() if path.is_file()]
    assert data
    assert {path.suffix for path in configs} == {".toml", ".json", ".service"}
    assert {str(path.relative_to(repository)) for path in data + configs} <= names


def test_the_commands_point_at_functions_that_exist(wheel, tmp_path):
    wheel.extractall(tmp_path)
    (entry_points,) = tmp_path.glob("*.dist-info/entry_points.txt")
    parser = configparser.ConfigParser()
    parser.read_string(entry_points.read_text(encoding="utf-8"))
    commands = dict(parser["console_scripts"])
    assert commands == {"skiff": "cli.main:main", "skiffd": "edge_runtime.skiffd:main"}
    script = (
        "import importlib, json, sys; from importlib.resources import files\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"  # before the checkout that an editable install adds
        "found = {}\n"
        f"for target in {sorted(commands.values())!r}:\n"
        "    module, _, name = target.partition(':')\n"
        "    loaded = importlib.import_module(module)\n"
        "    assert callable(getattr(loaded, name)), target\n"
        "    found[target] = loaded.__file__\n"
        "found['configs'] = sorted(p.name for p in files('device_configs').iterdir() if p.name.endswith('.toml'))\n"
        "print(json.dumps(found))\n"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found.pop("configs")
    assert all(path.startswith(str(tmp_path)) for path in found.values()), found

"""The locks: hashed, naming no index, agreeing with each other and with pyproject.toml."""

import re
import tomllib

import pytest
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

# What each lock installs besides the base dependencies.
EXTRAS = {"device": (), "host": ("host",), "dev": ("host", "dev")}
PIN = re.compile(
    r"^(?P<name>[a-z0-9-]+)==(?P<version>[^ ;]+)(?: ; (?P<marker>[^\\]+?))?"
    r"(?: --hash=sha256:[0-9a-f]{64})+$"
)
PROBED_PYTHONS = ("3.11.9", "3.12.9", "3.13.5")


def logical_lines(text):
    """Lines with their continuations joined and comments dropped."""
    joined = re.sub(r" *\\\n *", " ", text)
    return [line for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")]


def pins(repository, lock):
    """Name -> [(version, marker or None)] of one lock."""
    found: dict[str, list[tuple[Version, str | None]]] = {}
    for line in logical_lines((repository / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")):
        match = PIN.match(line)
        assert match is not None, f"requirements/{lock}.txt: not a hashed pin: {line}"
        found.setdefault(match["name"], []).append((Version(match["version"]), match["marker"]))
    return found


@pytest.fixture(scope="module")
def project(repository):
    return tomllib.loads((repository / "pyproject.toml").read_text(encoding="utf-8"))


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_names_no_index_and_no_place(repository, lock):
    text = (repository / "requirements" / f"{lock}.txt").read_text(encoding="utf-8")
    for trace in (
        "://",
        "--index-url",
        "--extra-index-url",
        "--find-links",
        "file:",
        "/home/",
        "/tmp/",
        " @ ",
    ):
        assert trace not in text, f"requirements/{lock}.txt contains {trace!r}"


@pytest.mark.parametrize("lock", EXTRAS)
def test_every_requirement_is_pinned_and_hashed(repository, lock):
    assert len(pins(repository, lock)) >= 10


@pytest.mark.parametrize("lock", EXTRAS)
def test_a_lock_satisfies_the_project(repository, project, lock):
    wanted = list(project["project"]["dependencies"])
    for extra in EXTRAS[lock]:
        wanted += project["project"]["optional-dependencies"][extra]
    if lock == "dev":  # an install without build isolation needs the backend here
        wanted += project["build-system"]["requires"]
    locked = pins(repository, lock)
    for requirement in map(Requirement, wanted):
        versions = locked.get(canonicalize_name(requirement.name))
        assert versions, f"{requirement} is not in requirements/{lock}.txt; run `make lock`"
        for version, _ in versions:
            assert version in requirement.specifier, f"{requirement}: requirements/{lock}.txt has {version}"


def test_the_device_lock_has_nothing_of_the_host(repository):
    assert not pins(repository, "device").keys() & {
        "scikit-learn",
        "onnx",
        "skl2onnx",
        "typer",
        "rich",
        "pydantic",
        "scipy",
    }


@pytest.mark.parametrize("lock", ["device", "host"])
def test_locks_agree(repository, lock):
    dev = pins(repository, "dev")
    for name, versions in pins(repository, lock).items():
        assert set(versions) <= set(dev[name]), (
            f"{name} differs between {lock}.txt and dev.txt; run `make lock`"
        )


@pytest.mark.parametrize("python", PROBED_PYTHONS)
def test_one_version_of_each_package_on_every_python(repository, python):
    for name, versions in pins(repository, "dev").items():
        environment = {
            "python_full_version": python,
            "python_version": python.rpartition(".")[0],
            "sys_platform": "linux",
        }
        chosen = [
            version for version, marker in versions if marker is None or Marker(marker).evaluate(environment)
        ]
        assert len(chosen) <= 1, f"{name}: {chosen} all apply to Python {python}"
        if any(marker is None or "python" in marker for _, marker in versions):
            assert chosen, f"{name}: no version for Python {python}"


def test_known_bad_versions_stay_out(project):
    base = {r.name: r for r in map(Requirement, project["project"]["dependencies"])}
    host = {r.name: r for r in map(Requirement, project["project"]["optional-dependencies"]["host"])}
    assert Version("1.26.0") not in base["onnxruntime"].specifier  # wrong labels for binary random forests
    assert Version("7.0.0") not in host["protobuf"].specifier  # skl2onnx refuses numpy attributes

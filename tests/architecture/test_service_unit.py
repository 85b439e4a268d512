"""The systemd unit: what it promises, and that it agrees with the device configurations beside it.

``systemd-analyze verify`` and ``security`` are run by hand when it changes; they are not where tests run.
"""

import re
import tomllib
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "device_configs"
UNIT = FOLDER / "skiffd.service"


def sections():
    """Section -> key -> values in order, as systemd.syntax(7) reads them."""
    found: dict[str, dict[str, list[str]]] = {}
    name = ""
    for line in UNIT.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            name = line.strip("[]")
        elif line and not line.startswith("#"):
            key, separator, value = line.partition("=")
            assert separator, line
            found.setdefault(name, {}).setdefault(key, []).append(value)
    return found


SERVICE = sections()["Service"]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("Type", "notify"),
        ("NotifyAccess", "main"),
        ("Restart", "always"),
        ("DynamicUser", "yes"),
        ("StateDirectory", "skiffd"),
        ("ProtectSystem", "strict"),
        ("ProtectHome", "yes"),
        ("PrivateTmp", "yes"),
        ("PrivateDevices", "yes"),
        ("NoNewPrivileges", "yes"),
        ("CapabilityBoundingSet", ""),
        ("ProtectKernelTunables", "yes"),
        ("ProtectKernelModules", "yes"),
        ("ProtectControlGroups", "yes"),
        ("RestrictNamespaces", "yes"),
        ("RestrictAddressFamilies", "AF_INET AF_INET6 AF_UNIX"),
        ("MemoryDenyWriteExecute", "yes"),
        ("SystemCallArchitectures", "native"),
        ("SystemCallErrorNumber", "EPERM"),
        ("UMask", "0077"),
    ],
)
def test_it_is_hardened(key, value):
    assert SERVICE[key] == [value]


def test_a_device_is_never_given_up():
    assert sections()["Unit"]["StartLimitIntervalSec"] == ["0"]
    assert int(SERVICE["RestartSec"][0]) >= 5
    assert int(SERVICE["WatchdogSec"][0]) >= 30


def test_the_clock_can_be_read_but_not_set():
    *_, last = SERVICE["SystemCallFilter"]
    assert {"adjtimex", "clock_adjtime"} <= set(last.split())
    assert "ProtectClock" not in SERVICE
    assert not any("clock_settime" in value for value in SERVICE["SystemCallFilter"])


def test_children_may_limit_themselves_and_step_back():
    *_, last = SERVICE["SystemCallFilter"]
    assert {"setrlimit", "prlimit64", "setpriority"} <= set(last.split())


def test_every_choice_is_explained():
    """Each paragraph of settings begins with its reason."""
    for paragraph in UNIT.read_text(encoding="utf-8").split("\n\n"):
        lines = [line for line in paragraph.splitlines() if not line.startswith("[")]
        assert lines[0].startswith("#") or lines == ["WantedBy=multi-user.target"], paragraph


def test_it_starts_what_the_package_installs_with_the_state_that_the_configurations_name():
    command, config = SERVICE["ExecStart"][0].split()
    assert command.endswith("/bin/skiffd")
    assert config == "/etc/skiffd/skiffd.toml"
    for path in FOLDER.glob("*.toml"):
        if path.stem not in {"simulator", "container"}:
            device = tomllib.loads(path.read_text(encoding="utf-8"))["device"]
            assert device["state_dir"] == f"/var/lib/{SERVICE['StateDirectory'][0]}", path.stem


def size_bytes(text):
    return int(text[:-1]) * {"M": 1 << 20, "G": 1 << 30}[text[-1]]


def test_its_memory_holds_what_the_configurations_budget():
    """Or the configuration says in a comment what to allow instead."""
    for path in FOLDER.glob("*.toml"):
        text = path.read_text(encoding="utf-8")
        advised = re.search(r"MemoryMax=(\w+)", text)
        limit = size_bytes(advised[1] if advised else SERVICE["MemoryMax"][0])
        budgets = tomllib.loads(text)["budgets"]
        needed = max(
            budgets["rss_soft_mb"] + budgets["update_mb"], budgets["load_peak_mb"], budgets["rss_mb"]
        )
        assert needed * 1e6 <= limit, path.stem

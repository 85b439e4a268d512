"""The composition root where the disk is in the way; whole daemons are tried in tests/integration."""

import errno
import logging
from dataclasses import replace

import pytest

from edge_runtime.config import load
from edge_runtime.contract.errors import SkiffError
from edge_runtime.contract.ids import Digest, SessionId
from edge_runtime.core import lifecycle
from edge_runtime.core.events import Append, Save
from edge_runtime.daemon import Daemon, main

DIGEST = Digest("ab" * 32)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "skiffd.toml"
    path.write_text(
        '[device]\nid = "d1"\nfleet = "f"\nstate_dir = "state"\n[broker]\nport = 1\n'
        '[model]\nname = "m"\ntrust_root = "root.json"\n',
        encoding="utf-8",
    )
    return load(path)


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def committed(config):
    return lifecycle.SlotState(model=config.model, committed=DIGEST)


def test_a_state_that_is_on_disk_already_needs_no_disk(config, monkeypatch):
    daemon = Daemon(config)
    daemon._perform(Save(committed(config)))
    again = Daemon(config)
    monkeypatch.setattr(again._slots, "write_record", no_space)
    again._perform(Save(committed(config)))
    assert again._agent.slots.committed == DIGEST


def test_a_full_disk_leaves_the_state_before_and_says_what_to_do(config, monkeypatch):
    daemon = Daemon(config)
    daemon._perform(Save(committed(config)))
    monkeypatch.setattr(daemon._slots, "write_record", no_space)
    with pytest.raises(SkiffError, match="free some space"):
        daemon._perform(Save(replace(committed(config), previous=Digest("cd" * 32))))
    assert Daemon(config)._agent.slots == committed(config)


def test_a_record_that_cannot_be_kept_is_logged_and_does_not_end_the_daemon(config, monkeypatch, caplog):
    daemon = Daemon(config)

    def refuse(*_):
        raise SkiffError("disk full")

    monkeypatch.setattr(daemon._outbox, "append", refuse)
    with caplog.at_level(logging.ERROR, logger="skiffd"):
        daemon._perform(Append(SessionId("0" * 16), 7, "topic", b"payload"))
    assert "record_lost seq=7 topic=topic reason=disk full" in caplog.text


def test_the_command_names_what_is_wrong_with_its_file(tmp_path, capsys):
    path = tmp_path / "bad.toml"
    path.write_text(
        '[device]\nid = "d1"\nfleet = "f"\nstate_dirr = "s"\n[model]\nname = "m"\ntrust_root = "r"\n[broker]\n',
        encoding="utf-8",
    )
    assert main([str(path)]) == 2
    assert "device.state_dir: is missing (is 'state_dirr' meant for it?)" in capsys.readouterr().err

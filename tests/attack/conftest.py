"""What the attacks share: a device that serves a verified model, made once and copied for each."""

import shutil

import pytest

from tests.support.attacked import Attacked, settle, take_trials_for_granted
from tests.support.memory_broker import MemoryBroker


@pytest.fixture(scope="session")
def settled(tmp_path_factory):
    broker = MemoryBroker(packed=True)
    folder = tmp_path_factory.mktemp("settled")
    settle(folder, broker)
    return folder, broker.retained


@pytest.fixture
def device(tmp_path, settled, monkeypatch, caplog):
    folder, retained = settled
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    broker = MemoryBroker(packed=True)
    broker.retained.update(retained)
    broker.stand_before(monkeypatch)
    take_trials_for_granted(monkeypatch)
    return Attacked(tmp_path, broker, caplog)

"""The whole loop behind the locked-down broker: nobody who is honest is denied anything on the way to a new model."""

import re
from pathlib import Path

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from cli.operate import broker_of
from cli.view import FleetView
from converters import convert
from tests.services import find_mosquitto, missing_service
from tests.support.locked import Enrolled, LockedMosquitto, Wallet, locked_broker
from tests.support.loop import FLEET, MODEL, Loop, wait_for
from trainer.datasets import load_watch

DENIED = re.compile(r".*Denied PUBLISH.*")


class LockedLoop(Loop):
    """A `Loop` in which everybody shows the certificate that was issued to them."""

    def __init__(self, folder: Path, broker: LockedMosquitto, enrolled: Enrolled) -> None:
        super().__init__(folder, broker)
        self._enrolled = enrolled
        config = folder / "aggregator.toml"
        ca = f'port = {broker.port}\nca = "{enrolled.authority.certificate}"\n'
        text = config.read_text(encoding="utf-8").replace(f"port = {broker.port}\n", ca)
        for which in ("aggregator", "coordinator", "publisher"):
            text += f"\n[broker.{which}]\n{identity(enrolled.service(which))}"
        config.write_text(text, encoding="utf-8")
        self.view = FleetView(config)
        self.broker = broker_of(self.view.config)

    def configuration(self, home: Path) -> str:
        wallet = self._enrolled.device(home.name)
        return f'{super().configuration(home)}\n[broker.tls]\nca = "{wallet.ca}"\n{identity(wallet)}'


def identity(wallet: Wallet) -> str:
    return f'certificate = "{wallet.certificate}"\nkey = "{wallet.key}"\n'


@pytest.mark.slow
@pytest.mark.broker
def test_a_fleet_behind_mutual_tls_gets_its_model_and_is_denied_nothing(tmp_path):
    binary = find_mosquitto()
    if binary is None:
        missing_service("mosquitto is not installed (Debian: apt-get install mosquitto)")
    rows = load_watch().select(people=(1, 2, 3), wrists=(0,))
    rows = rows.take(np.arange(0, len(rows), 6))
    forest = RandomForestClassifier(8, max_depth=7, random_state=0)
    forest.fit(rows.features, np.asarray(rows.label_names)[rows.labels])
    artifact = convert(
        forest, rows.features, tmp_path / "m.onnx", name=MODEL, version="1", groups=rows.groups, probes=500
    ).path
    with locked_broker(binary, tmp_path / "broker", FLEET) as (enrolled, broker):
        loop = LockedLoop(tmp_path, broker, enrolled)
        try:
            loop.start(devices=2)
            digest = loop.offer(artifact)
            loop.wait_serving(digest)
            wait_for(lambda: len({d for (d, _, _), _ in loop.stored()[0]}) == 2, "windows of both devices")
            assert loop.dead_letters() == ()
            assert DENIED.findall(broker.log) == []
            users = set(re.findall(r"New client connected .*u'([^']*)'", broker.log))
            services = {f"skiff-{which}" for which in ("aggregator", "coordinator", "publisher")}
            assert users == {"watch-1", "watch-2"} | services
        finally:
            loop.close()

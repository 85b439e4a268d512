"""The demonstration's devices: one ``skiffd`` process for each person and wrist, replaying that watch's recordings."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from cli.broker import HOST
from edge_runtime.contract import ids
from edge_runtime.contract.ids import DeviceId
from trainer.datasets import WatchData

FLEET: Final = ids.fleet_id("demo")
MODEL: Final = ids.model_name("watch")
WRISTS: Final = ("left", "right")
ROWS_PER_SECOND: Final = 300.0
"""A watch makes 5 rows a second: the replay runs 60 times as fast as life."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One simulated watch: its name, who wears it where, and the configuration of its daemon."""

    name: DeviceId
    person: int
    wrist: str
    config: Path

    @property
    def command(self) -> tuple[str, ...]:
        """The command line of its daemon."""
        return (sys.executable, "-m", "edge_runtime.skiffd", str(self.config))


def provision(folder: Path, data: WatchData, *, broker_port: int, root: Path, base: Path) -> list[Device]:
    """Writes the recordings and the configuration of every watch into ``folder``; left wrists first."""
    devices = []
    for person, wrist in sorted(data.devices, key=lambda pair: (pair[1], pair[0])):
        name = ids.device_id(f"watch-{person:02d}-{WRISTS[wrist]}")
        home = folder / name
        home.mkdir(parents=True, exist_ok=True)
        rows = data.device_rows(person, wrist)
        np.savez(
            home / "recordings.npz",
            features=rows.features,
            labels=np.asarray(rows.label_names)[rows.labels],
            recording=rows.recording,
        )
        config = home / "skiffd.toml"
        config.write_text(
            f'base = "{base}"\n\n'
            f'[device]\nid = "{name}"\nfleet = "{FLEET}"\nstate_dir = "state"\n'
            f'attributes = {{ person = "{person}", wrist = "{WRISTS[wrist]}" }}\n\n'
            f'[broker]\nhost = "{HOST}"\nport = {broker_port}\n\n'
            f'[model]\nname = "{MODEL}"\ntrust_root = "{root}"\n\n'
            f'[source]\nkind = "replay"\npath = "recordings.npz"\n'
            f"rows_per_second = {ROWS_PER_SECOND}\nseed = {person * 2 + wrist}\n",
            encoding="utf-8",
        )
        devices.append(Device(name=name, person=person, wrist=WRISTS[wrist], config=config))
    return devices

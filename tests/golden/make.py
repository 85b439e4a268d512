"""Writes the golden bytes: ``python -m tests.golden.make`` from the root of the checkout.

Files of every version are kept for ever: fleets are never all on one version. Run this for a new value or a new
version only; `test_golden_bytes.py` fails when an existing file would change. What minors 0 to 2 wrote cannot be made
again: it stands in their folders as it was.
"""

import json
from pathlib import Path
from typing import Any, Final

from edge_runtime.contract import ids, release
from edge_runtime.contract.codec import encode
from tests.golden import values

MINOR_0: Final = Path(__file__).parent / "v1"
MINOR_1: Final = Path(__file__).parent / "v1.1"
MINOR_2: Final = Path(__file__).parent / "v1.2"
FOLDER: Final = Path(__file__).parent / "v1.3"
DEVICES: Final = ("watch-01-left", "watch-02-left", "a", "z" * 64)
ROLLOUTS: Final = ("r-1", "r-2")


def facts() -> dict[str, Any]:
    """What both sides must compute alike and no message carries: layout ids and places in a rollout."""
    return {
        "layout": {"classifier": values.SPEC.layout, "regressor": values.REGRESSOR_SPEC.layout},
        "stage_hash": {
            rollout: {
                device: str(release.stage_hash(ids.device_id(device), ids.rollout_id(rollout)))
                for device in DEVICES
            }
            for rollout in ROLLOUTS
        },
    }


def files() -> dict[str, bytes]:
    """File name to content."""
    found = {f"{name}.msgpack": encode(message) for name, message in values.MESSAGES.items()}
    found["release.json"] = release.to_payload(values.RELEASE)
    found["release-shadow.json"] = release.to_payload(values.SHADOWED)
    found["release-strict.json"] = release.to_payload(values.STRICT)
    found["facts.json"] = (json.dumps(facts(), indent=2, sort_keys=True) + "\n").encode()
    return found


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, data in files().items():
        (FOLDER / name).write_bytes(data)
        print(f"{name}: {len(data)} bytes")

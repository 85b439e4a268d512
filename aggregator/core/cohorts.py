"""Devices judged together: the whole fleet, and the devices that share a value of a named attribute."""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from edge_runtime.contract.ids import DeviceId

FLEET: Final = "fleet"


def split(
    devices: Iterable[DeviceId], attributes: Mapping[DeviceId, Mapping[str, str]], names: Sequence[str]
) -> dict[str, tuple[DeviceId, ...]]:
    """``fleet`` and every ``name=value`` with its devices, sorted.

    A device without the attribute belongs to the fleet only. An attribute whose one value all devices share
    makes no cohort of its own: it would judge the fleet twice.
    """
    everyone = tuple(sorted(devices))
    found: dict[str, list[DeviceId]] = defaultdict(list)
    for name in names:
        for device in everyone:
            value = attributes.get(device, {}).get(name, "")
            if value:
                found[f"{name}={value}"].append(device)
    cohorts = {FLEET: everyone}
    cohorts.update((key, tuple(found[key])) for key in sorted(found) if len(found[key]) < len(everyone))
    return cohorts

"""What a request for a better model tells the trainer, and when one is held back.

`aggregator.core.judge` wishes for one when the inputs of a cohort keep moving **and** its predictions or its accuracy
have moved: drift alone is no reason, harmless drift is common. One request per artifact: the answer to it is another
artifact.
"""

import base64
import json
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict
from typing import Final

from aggregator.config import RetrainConfig
from aggregator.looks import Alarm, Block, Wish
from aggregator.records import RetrainRequest
from edge_runtime.contract.ids import DeviceId, Digest, FleetId, ModelName
from edge_runtime.contract.packing import pack_planes

SCHEMA: Final = 2


def held_back(
    digest: Digest, asked: Collection[Digest], latest_ns: int | None, config: RetrainConfig, now_ns: int
) -> bool:
    """Whether no request is made: ``asked`` holds the artifacts that one was made for, ``latest_ns`` is when the
    model's newest was.
    """
    cooling = latest_ns is not None and now_ns < latest_ns + int(config.cooldown_seconds * 1e9)
    return digest in asked or cooling


def request(  # noqa: PLR0917 (the fields of a document)
    fleet: FleetId,
    model: ModelName,
    digest: Digest,
    wish: Wish,
    alarms: Iterable[Alarm],
    blocks: Iterable[Block],
    attributes: Mapping[DeviceId, Mapping[str, str]],
    now_ns: int,
) -> RetrainRequest:
    """The request for the cohort of ``wish``, with each of its devices' histograms, so that training rows can be
    re-weighted to what the fleet sees without one raw row. Counters are packed as on the wire
    (`packing.pack_planes`), in base64.
    """
    name, _, value = wish.cohort.partition("=")
    members = [
        block
        for block in blocks
        if not value or attributes.get(block.reading.device, {}).get(name, "") == value
    ]
    why = f"{wish.cohort}: {wish.why}"
    document = {
        "schema": SCHEMA,
        "fleet": fleet,
        "model": model,
        "digest": digest,
        "cohort": wish.cohort,
        "at_ns": now_ns,
        "why": why,
        "windows": {
            "first": min((block.first for block in members), default=0),
            "last": max((block.last for block in members), default=0),
        },
        "alarms": [asdict(alarm) for alarm in alarms if alarm.cohort == wish.cohort],
        "devices": [_device(block, attributes.get(block.reading.device, {})) for block in members],
    }
    return RetrainRequest(
        model=model,
        digest=digest,
        cohort=wish.cohort,
        at_ns=now_ns,
        why=why,
        document=json.dumps(document, sort_keys=True),
    )


def _device(block: Block, attributes: Mapping[str, str]) -> dict[str, object]:
    reading = block.reading
    return {
        "device": reading.device,
        "attributes": dict(attributes),
        "windows": [block.first, block.last],
        "layout": reading.profile.layout,
        "rows": reading.profile.rows,
        "labelled": reading.labelled,
        "correct": reading.correct,
        "counts": base64.b64encode(pack_planes(reading.profile.counts)).decode("ascii"),
        "sums": reading.profile.sums.tolist(),
    }

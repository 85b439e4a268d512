"""When a better model is asked for, and what the request tells the trainer.

Drift alone is no reason: harmless drift is common. A request needs inputs that moved persistently, against
the training (``skew``) or against the devices' own past (``drift``), **and** predictions or accuracy that
moved, in the same cohort of the same artifact. One request per artifact: the answer to it is another
artifact.
"""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Final

from aggregator.config import RetrainConfig
from aggregator.records import Block, RetrainRequest, Verdict
from edge_runtime.contract.ids import DeviceId, Digest, FleetId
from edge_runtime.contract.packing import pack_planes

SCHEMA: Final = 1


def wanted(
    verdicts: Iterable[Verdict],
    asked: Iterable[Digest],
    latest_ns: int | None,
    config: RetrainConfig,
    now_ns: int,
) -> tuple[Verdict, ...]:
    """The verdicts of the worst cohort that call for a retraining, what moved in the inputs first; empty when
    none does.

    ``asked`` holds the artifacts a request was already made for, ``latest_ns`` when the model's newest one
    was.
    """
    asked = set(asked)
    if latest_ns is not None and now_ns < latest_ns + int(config.cooldown_seconds * 1e9):
        return ()
    drifted: dict[tuple[Digest, str], list[Verdict]] = {}
    for verdict in verdicts:
        if verdict.outcome == "drifted" and verdict.digest not in asked:
            drifted.setdefault((verdict.digest, verdict.cohort), []).append(verdict)
    calls = []
    for found in drifted.values():
        inputs = [v for v in found if v.kind in ("skew", "drift")]
        effects = [v for v in found if v.kind in ("prediction", "performance")]
        if inputs and (effects or not config.require_effect):
            calls.append((min(v.judgement.p for v in inputs), (*inputs, *effects)))
    return min(calls, key=lambda call: call[0])[1] if calls else ()


def request(
    fleet: FleetId,
    calls: Sequence[Verdict],
    blocks: Sequence[Block],
    attributes: Mapping[DeviceId, Mapping[str, str]],
    now_ns: int,
) -> RetrainRequest:
    """The request for the cohort of ``calls``, with each device's histograms, so that training rows can be
    re-weighted to what the fleet sees without one raw row. Counters are packed as on the wire
    (`packing.pack_planes`), in base64.
    """
    first = calls[0]
    why = f"{first.cohort}: " + "; ".join(f"{v.kind} {v.outcome} ({v.reason})" for v in calls)
    members = set(first.devices)
    document = {
        "schema": SCHEMA,
        "fleet": fleet,
        "model": first.model,
        "digest": first.digest,
        "cohort": first.cohort,
        "at_ns": now_ns,
        "why": why,
        "windows": {"first": first.first, "last": first.last},
        "verdicts": [asdict(verdict) for verdict in calls],
        "devices": [
            {
                "device": block.device,
                "attributes": dict(attributes.get(block.device, {})),
                "windows": [block.first, block.last],
                "layout": block.profile.layout,
                "rows": block.rows,
                "labelled": block.labelled,
                "correct": block.correct,
                "counts": base64.b64encode(pack_planes(block.profile.counts)).decode("ascii"),
                "sums": block.profile.sums.tolist(),
            }
            for block in blocks
            if block.device in members
        ],
    }
    return RetrainRequest(
        model=first.model,
        digest=first.digest,
        cohort=first.cohort,
        at_ns=now_ns,
        why=why,
        document=json.dumps(document, sort_keys=True),
    )

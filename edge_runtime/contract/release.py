"""The signed release: one document per cohort and model that says who should run what.

A device is in the stage when the hash of its name and the rollout's lies below the threshold, so one publish
moves any number of devices; halting, promoting and rolling back are other thresholds and incumbents.
"""

import hashlib
import json
from dataclasses import dataclass
from typing import Final

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import CohortId, DeviceId, Digest, FleetId, ModelName, RolloutId

SCHEMA: Final = 1
EVERYONE: Final = 1 << 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialGate:
    """What a trial needs before it is committed: predictions and seconds inside the budgets.

    ``starts`` is how many activations without progress a device allows before the previous model boots. Of the calls,
    a candidate may leave a share of ``max_refused`` without an answer that the model before it answers; with 1 they are
    counted only.
    """

    predictions: int = 200
    seconds: float = 5.0
    starts: int = 3
    max_refused: float = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class ShadowGate:
    """What a candidate needs before its trial: ``rows`` live rows answered beside the model that serves.

    It is refused when it answers a larger share of them otherwise than ``max_disagreement``; with 1 disagreement is
    counted only. With 0 rows there is no shadow.
    """

    rows: int = 0
    max_disagreement: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Release:
    """Who should run what, in one cohort, of one model family.

    Devices whose `stage_hash` is below ``threshold`` (0 to 2^64) run ``candidate``, the others
    ``incumbent``. ``revision`` rises with every change in the cohort; ``attempt`` rises when a candidate that devices
    have quarantined is offered again on purpose.
    """

    fleet: FleetId
    cohort: CohortId
    model: ModelName
    rollout: RolloutId
    revision: int
    threshold: int
    candidate: Digest | None
    incumbent: Digest | None
    attempt: int = 1
    trial: TrialGate = TrialGate()
    shadow: ShadowGate = ShadowGate()


def stage_hash(device: DeviceId, rollout: RolloutId) -> int:
    """Where a device falls in a rollout: the first 64 bits of SHA-256 over both names."""
    return int.from_bytes(hashlib.sha256(f"{device}\0{rollout}".encode()).digest()[:8], "big")


def desired(release: Release, device: DeviceId) -> Digest | None:
    """The digest ``device`` should run under ``release``; None when it should keep what it has."""
    if release.candidate is not None and stage_hash(device, release.rollout) < release.threshold:
        return release.candidate
    return release.incumbent


def to_payload(release: Release) -> bytes:
    """The canonical bytes that are signed. What is left at its default is not in them if it came later."""
    trial: dict[str, object] = {
        "predictions": release.trial.predictions,
        "seconds": release.trial.seconds,
        "starts": release.trial.starts,
    }
    if release.trial.max_refused != TrialGate().max_refused:
        trial["max_refused"] = release.trial.max_refused
    document: dict[str, object] = {
        "schema": SCHEMA,
        "fleet": release.fleet,
        "cohort": release.cohort,
        "model": release.model,
        "rollout": release.rollout,
        "revision": release.revision,
        "threshold": str(release.threshold),
        "candidate": release.candidate or "",
        "incumbent": release.incumbent or "",
        "attempt": release.attempt,
        "trial": trial,
    }
    if release.shadow != ShadowGate():
        document["shadow"] = {
            "rows": release.shadow.rows,
            "max_disagreement": release.shadow.max_disagreement,
        }
    return json.dumps(document, sort_keys=True, separators=(",", ":")).encode()


def from_payload(payload: bytes) -> Release:
    """Reads a release; raises `ContractError`. The signature is the caller's to check, before this is believed."""
    try:
        document = json.loads(payload)
    except (ValueError, RecursionError) as e:
        raise ContractError(f"release: not JSON ({e})") from e
    f = Fields(document, "release")
    schema = f.integer("schema")
    if schema != SCHEMA:
        raise ContractError(f"release: schema {schema} is not {SCHEMA}: update the older side")
    threshold = f.text("threshold", max_length=20)
    if not threshold.isdecimal() or int(threshold) > EVERYONE:
        raise f.fail("threshold", f"{threshold!r} is not a whole number of at most 2^64")
    trial, shadow, usual = f.section("trial", {}), f.section("shadow", {}), TrialGate()
    return Release(
        fleet=ids.fleet_id(f.text("fleet")),
        cohort=ids.cohort_id(f.text("cohort")),
        model=ids.model_name(f.text("model")),
        rollout=ids.rollout_id(f.text("rollout")),
        revision=f.integer("revision", low=1),
        threshold=int(threshold),
        candidate=_digest_or_none(f.text("candidate", "")),
        incumbent=_digest_or_none(f.text("incumbent", "")),
        attempt=f.integer("attempt", 1, low=1),
        trial=TrialGate(
            predictions=trial.integer("predictions", usual.predictions),
            seconds=trial.number("seconds", usual.seconds, low=0.0),
            starts=trial.integer("starts", usual.starts, low=1, high=1000),
            max_refused=trial.number("max_refused", usual.max_refused, low=0.0, high=1.0),
        ),
        shadow=ShadowGate(
            rows=shadow.integer("rows", 0),
            max_disagreement=shadow.number("max_disagreement", 1.0, low=0.0, high=1.0),
        ),
    )


def _digest_or_none(text: str) -> Digest | None:
    return ids.digest(text) if text else None

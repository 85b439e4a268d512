"""How control state is written in the ledger: JSON text, read back field by field. What is None is left out."""

import base64
import json
import math
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from aggregator.config import read_gates, read_shadow, read_stages, read_trial
from aggregator.looks import Alarm, Look, Reading, Verdict
from aggregator.records import Gates, Rollout
from edge_runtime.contract import ids
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.messages import ModelReport
from edge_runtime.contract.packing import pack_planes, unpack_counts
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.release import ShadowGate, TrialGate

MAX_TEXT: Final = 1 << 16


def to_text(value: Any) -> str:
    """A record (a dataclass) as canonical JSON text."""
    return json.dumps(asdict(value, dict_factory=_without_none), sort_keys=True, separators=(",", ":"))


def _without_none(items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    return {key: value for key, value in items if value is not None}


def list_text(values: Iterable[Any]) -> str:
    """Several records as one JSON list."""
    return f"[{','.join(to_text(value) for value in values)}]"


def _digest(f: Fields, name: str) -> ids.Digest | None:
    text = f.text(name, "")
    return ids.digest(text) if text else None


def read_rollout(text: str) -> Rollout:
    """Reads a `Rollout` written by `to_text`; raises `ContractError`."""
    f = Fields(json.loads(text), "rollout")
    ready = f.integer("ready_since_ns", -1, low=-1)
    return Rollout(
        rollout=ids.rollout_id(f.text("rollout")),
        cohort=ids.cohort_id(f.text("cohort")),
        model=ids.model_name(f.text("model")),
        candidate=ids.digest(f.text("candidate")),
        incumbent=_digest(f, "incumbent"),
        stages=read_stages(f, "stages", ()),
        gates=read_gates(f.section("gates"), Gates()),
        trial=read_trial(f.section("trial"), TrialGate()),
        shadow=read_shadow(f.section("shadow", {}), ShadowGate()),
        attempt=f.integer("attempt"),
        by=f.text("by", max_length=MAX_TEXT),
        why=f.text("why", max_length=MAX_TEXT),
        created_ns=f.integer("created_ns"),
        state=f.text("state"),
        stage=f.integer("stage"),
        cap=f.integer("cap", low=-1),
        threshold=f.integer("threshold", high=1 << 64),
        stage_since_ns=f.integer("stage_since_ns"),
        ready_since_ns=None if ready < 0 else ready,
        revision=f.integer("revision"),
        note=f.text("note", max_length=MAX_TEXT),
    )


def read_reports(text: str) -> tuple[ModelReport, ...]:
    """Reads a list of `ModelReport` written by `list_text`; raises `ContractError`."""
    f = Fields({"models": json.loads(text)}, "device")
    return tuple(
        ModelReport(
            model=ids.model_name(g.text("model")),
            state=g.text("state"),
            serving=_digest(g, "serving"),
            previous=_digest(g, "previous"),
            candidate=_digest(g, "candidate"),
            rollout=g.text("rollout"),
            revision=g.integer("revision"),
            outcome=g.text("outcome"),
            outcome_digest=_digest(g, "outcome_digest"),
            reason=g.text("reason", max_length=MAX_TEXT),
            quarantined=tuple(ids.digest(d) for d in g.texts("quarantined")),
            shadow_rows=g.integer("shadow_rows", 0),
            shadow_disagreed=g.integer("shadow_disagreed", 0),
        )
        for g in f.sections("models")
    )


def read_verdict(text: str) -> Verdict:
    """Reads a `Verdict` written by `to_text`; raises `ContractError`."""
    f = Fields(json.loads(text), "verdict")
    return Verdict(
        kind=f.text("kind"),
        model=ids.model_name(f.text("model")),
        digest=ids.digest(f.text("digest")),
        cohort=f.text("cohort"),
        at_ns=f.integer("at_ns"),
        outcome=f.text("outcome"),
        reason=f.text("reason", max_length=MAX_TEXT),
        p=f.number("p"),
        look=f.integer("look"),
        judged=f.integer("judged"),
        moved=f.texts("moved"),
        devices=tuple(ids.device_id(name) for name in f.texts("devices")),
        left_out=tuple((name, str(why)) for name, why in _pairs(f, "left_out")),
    )


def read_alarm(text: str) -> Alarm:
    """Reads an `Alarm` written by `to_text`; raises `ContractError`."""
    f = Fields(json.loads(text), "alarm")
    return Alarm(
        kind=f.text("kind"),
        feature=f.text("feature", "") or None,
        cohort=f.text("cohort"),
        opened_window=f.integer("opened_window"),
        closed_window=None,
        devices=tuple(ids.device_id(name) for name in f.texts("devices")),
        severity=f.text("severity"),
        why=f.text("why", max_length=MAX_TEXT),
        evidence=tuple((name, _plain(value)) for name, value in _pairs(f, "evidence")),
    )


def read_ended(text: str) -> tuple[tuple[ids.SessionId, int], ...]:
    """Replaced sessions with their highest numbers; earlier versions wrote the sessions alone."""
    pairs = ((said, -1) if isinstance(said, str) else said for said in json.loads(text))
    return tuple((ids.session_id(session), int(seq)) for session, seq in pairs)


def look_text(look: Look) -> str:
    """A look's figures and accuracy, for people, and its suspects; a figure that there is none of is null."""
    found = {
        "figures": {
            name: {key: _or_null(value) for key, value in asdict(familiar).items()}
            for name, familiar in look.figures.items()
        },
        "estimate": asdict(look.estimate),
        "suspects": look.suspects,
    }
    return json.dumps(found, sort_keys=True)


def _or_null(value: float | tuple[float, ...]) -> float | list[Any] | None:
    if isinstance(value, tuple):
        return [_or_null(part) for part in value]
    return value if math.isfinite(value) else None


def read_suspects(text: str) -> dict[str, tuple[ids.DeviceId, ...]]:
    """`Look.suspects` from what `look_text` wrote; raises `ContractError`."""
    f = Fields(json.loads(text), "look").section("suspects")
    return {name: tuple(map(ids.device_id, f.texts(name))) for name in f.names()}


def reading_text(reading: Reading) -> str:
    """A reading as JSON text, its counters packed as on the wire."""
    found = {name: getattr(reading, name) for name in _READING} | {
        "profile": _profile_document(reading.profile)
    }
    return json.dumps(found, sort_keys=True)


_READING: Final = ("device", "start_ns", "end_ns", "windows", "labelled", "correct", "refused")


def read_reading(text: str) -> Reading:
    """Reads what `reading_text` wrote; raises `ContractError`."""
    f = Fields(json.loads(text), "reading")
    return Reading(
        device=ids.device_id(f.text("device")),
        profile=_read_profile(f.section("profile")),
        start_ns=f.integer("start_ns"),
        end_ns=f.integer("end_ns"),
        windows=f.integer("windows"),
        labelled=f.integer("labelled"),
        correct=f.integer("correct"),
        refused=tuple((reason, int(n)) for reason, n in _pairs(f, "refused")),
    )


def _plain(value: object) -> float | str:
    return float(value) if isinstance(value, int | float) else str(value)


def _pairs(f: Fields, name: str) -> list[tuple[str, Any]]:
    return [(str(pair[0]), pair[1]) for pair in f.items(name) if isinstance(pair, list)]


def _profile_document(profile: Profile) -> dict[str, Any]:
    return {
        "layout": profile.layout,
        "rows": profile.rows,
        "counts": base64.b64encode(pack_planes(profile.counts)).decode("ascii"),
        "sums": profile.sums.tolist(),
    }


def _read_profile(f: Fields) -> Profile:
    return Profile(
        layout=ids.layout_id(f.text("layout")),
        rows=f.integer("rows"),
        counts=unpack_counts(base64.b64decode(f.text("counts", max_length=1 << 24))),
        sums=np.asarray(f.integers("sums"), np.int64),
    )


def profile_text(profile: Profile) -> str:
    """A profile as JSON text, counters packed as on the wire."""
    return json.dumps(_profile_document(profile))


def read_profile(text: str) -> Profile:
    """Reads what `profile_text` wrote; raises `ContractError`."""
    return _read_profile(Fields(json.loads(text), "profile"))

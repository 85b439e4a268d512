"""How control state is written in the ledger: JSON text, read back field by field. What is None is left out."""

import base64
import json
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any, Final

import numpy as np

from aggregator.config import read_gates, read_stages, read_trial
from aggregator.records import Figure, Gates, Judgement, Rollout, Unit, Verdict
from edge_runtime.contract import ids
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.messages import ModelReport
from edge_runtime.contract.packing import pack_planes, unpack_counts
from edge_runtime.contract.profile import Profile
from edge_runtime.contract.release import TrialGate

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
        )
        for g in f.sections("models")
    )


def read_verdict(text: str) -> Verdict:
    """Reads a `Verdict` written by `to_text`; raises `ContractError`."""
    f = Fields(json.loads(text), "verdict")
    judgement = f.section("judgement")
    return Verdict(
        kind=f.text("kind"),
        model=ids.model_name(f.text("model")),
        digest=ids.digest(f.text("digest")),
        cohort=f.text("cohort"),
        at_ns=f.integer("at_ns"),
        outcome=f.text("outcome"),
        reason=f.text("reason", max_length=MAX_TEXT),
        judgement=Judgement(
            outcome=judgement.text("outcome"),
            reason=judgement.text("reason", max_length=MAX_TEXT),
            p=judgement.number("p"),
            alpha=judgement.number("alpha"),
            reference_units=judgement.integer("reference_units"),
            fleet_units=judgement.integer("fleet_units"),
            permutations=judgement.integer("permutations"),
            exact=judgement.flag("exact"),
            figures=tuple(_read_figure(g) for g in judgement.sections("figures")),
        ),
        devices=tuple(ids.device_id(name) for name in f.texts("devices")),
        left_out=tuple((ids.device_id(name), why) for name, why in _pairs(f, "left_out")),
        streak=f.integer("streak"),
        clear=f.integer("clear"),
        incident=f.flag("incident"),
        changed=f.text("changed"),
        first=f.integer("first"),
        last=f.integer("last"),
    )


def _read_figure(f: Fields) -> Figure:
    return Figure(
        name=f.text("name"),
        p=f.number("p"),
        statistic=f.number("statistic"),
        moved=f.flag("moved"),
        psi=f.number("psi"),
        ks=f.number("ks"),
        js_bits=f.number("js_bits"),
        wasserstein_sd=f.number("wasserstein_sd"),
        mean_shift_sd=f.number("mean_shift_sd"),
        missing=_two(f, "missing"),
        cut=f.number("cut"),
        below=_two(f, "below"),
        broad=f.number("broad"),
    )


def _two(f: Fields, name: str) -> tuple[float, float]:
    first, second = f.numbers(name)
    return first, second


def _pairs(f: Fields, name: str) -> list[tuple[str, str]]:
    return [(str(pair[0]), str(pair[1])) for pair in f.items(name) if isinstance(pair, list)]


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


def units_text(units: Iterable[Unit]) -> str:
    """The baseline's units as JSON text."""
    return json.dumps(
        [
            {
                "device": unit.device,
                "profile": _profile_document(unit.profile),
                "labelled": unit.labelled,
                "correct": unit.correct,
            }
            for unit in units
        ]
    )


def read_units(text: str) -> tuple[Unit, ...]:
    """Reads what `units_text` wrote; raises `ContractError`."""
    f = Fields({"units": json.loads(text)}, "baseline")
    return tuple(
        Unit(
            device=ids.device_id(g.text("device")),
            profile=_read_profile(g.section("profile")),
            labelled=g.integer("labelled"),
            correct=g.integer("correct"),
        )
        for g in f.sections("units")
    )

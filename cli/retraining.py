"""What ``skiff retrain`` reads from a request, and how it tells what became of the weights."""

import base64
import binascii
import json
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich import box
from rich.table import Table

from cli.output import note, out
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.packing import unpack_counts
from edge_runtime.contract.profile import CellSpec, Profile
from trainer.aimed import Aim, Outcome
from trainer.release import Made

MOST_SHOWN = 12


class Reweight(StrEnum):
    """Whether training rows are re-weighted to the fleet."""

    auto = "auto"
    moved = "moved"
    every = "all"
    off = "off"


ReweightOption = Annotated[
    Reweight,
    typer.Option(
        help="Training rows are weighted so that they look like the fleet in the features that moved. auto: where the "
        "overlap allows it and held-out rows show that it helps; moved: in any case, or refuse; all: likewise, in all "
        "features; off: never."
    ),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """A retrain request: the artifact it is about, the cohort, why, and what is read later: the devices."""

    digest: Digest
    cohort: str
    why: str
    devices: tuple[Fields, ...]


def read_request(path: Path) -> Request:
    """Reads the aggregator's JSON document; raises `ConfigError`."""
    try:
        f = Fields(json.loads(path.read_bytes()), str(path), ConfigError)
        return Request(
            digest=ids.digest(f.text("digest")),
            cohort=f.text("cohort"),
            why=f.text("why", max_length=1 << 16),
            devices=tuple(f.sections("devices")),
        )
    except (OSError, ValueError, ContractError) as e:
        raise ConfigError(f"{path}: not a retrain request ({e})") from e


def aim_of(request: Request, spec: CellSpec, wanted: Reweight) -> Aim | None:
    """What to fit for, None when that is not wanted or the request has no histogram; raises `ConfigError`."""
    if wanted is Reweight.off:
        return None
    devices = tuple(_profiles(request, spec))
    if not devices:
        if wanted is not Reweight.auto:
            raise ConfigError(f"--reweight {wanted}: the request holds no histogram of layout {spec.layout}")
        note(f"rows count alike: the request holds no histogram of layout {spec.layout}")
        return None
    return Aim(
        spec=spec,
        devices=devices,
        every=wanted is Reweight.every,
        insist=wanted is not Reweight.auto,
        others="=" in request.cohort,
    )


def _profiles(request: Request, spec: CellSpec) -> Iterator[Profile]:
    """The histograms of devices that have rows under ``spec``."""
    for f in request.devices:
        if f.text("layout") != spec.layout or not (rows := f.integer("rows")):
            continue
        try:
            yield Profile(
                layout=spec.layout,
                rows=rows,
                counts=unpack_counts(
                    base64.b64decode(f.text("counts", max_length=1 << 24), validate=True),
                    max_counters=spec.size,
                ),
                sums=np.array(f.integers("sums", ()), np.int64),
            ).check(spec)
        except (binascii.Error, ContractError) as e:
            raise f.fail("counts", f"is no histogram of the artifact's cells ({e})") from e


def tell_made(made: Made, request: Request) -> None:
    """Prints how the model does on rows it has not seen, and what became of the weights."""
    for name, value in made.evaluation:
        out.print(f"{made.measure} on {name}: {value:.3f}", markup=False)
    if made.outcome is not None:
        _tell_outcome(made.outcome, request.cohort)


def _tell_outcome(outcome: Outcome, cohort: str) -> None:
    """Prints what became of the weights."""
    found = outcome.reweighting
    out.print(f"{cohort}: {outcome.summary}", markup=False)
    if outcome.trial is not None and outcome.used:
        out.print(f"on held-out rows that are weighted to the fleet: {outcome.trial.text}", markup=False)
    if not found.fitted:
        return
    table = Table("feature", "KS before", "after", "not covered", box=box.SIMPLE, pad_edge=False)
    for feature in found.fitted[:MOST_SHOWN]:
        table.add_row(
            feature.name, f"{feature.before:.3f}", f"{feature.after:.3f}", f"{feature.uncovered:.1%}"
        )
    out.print(table)
    if len(found.fitted) > MOST_SHOWN:
        out.print(f"and {len(found.fitted) - MOST_SHOWN} more features")

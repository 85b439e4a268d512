"""Fleets of raw rows that are hard on row-level tests, with faults at known windows, counted as a device counts them.

    fleet = Fleet(seed=1, traits=SCENARIOS["together"], faults=(Fault("mean", 0.5, start=20, columns=(7,)),))
    judge = Judge(fleet.info, DriftConfig(), looks=fleet.windows, history=fleet.reference); judge.look(fleet.slices[0])

Every unit (training unit or device) draws its own habits from one population, once. Its rows are then

    x = offset + scale * z + amplitude * sin(2 pi * hour / 24)

where ``z`` has unit variance and lag-one correlation `Traits.ar`. Plain columns thus have a standard deviation near 1,
and sizes of faults are in that unit. The same seed gives the same rows, whatever faults are added: a faulty run and a
clean one differ in the faulty cells only.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from aggregator.looks import Reading, Slice
from edge_runtime.contract import ids
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo, Feature, Golden, Manifest, Reference
from edge_runtime.contract.profile import (
    Binner,
    CellSpec,
    FeatureCells,
    Profile,
    category_cells,
    cells_from_training,
    merge_all,
)
from tests.simulators.stream_faults import Fault, Faulty, part_of
from tests.simulators.stream_rows import (
    CATEGORIES,
    LABELS,
    SHAPES,
    Source,
    Stretch,
    Values,
    answer,
    probability,
    shaped,
)

__all__ = ("EPOCH_NS", "SCENARIOS", "Fault", "Fleet", "Traits")

EPOCH_NS: Final = 1_704_067_200_000_000_000  # Monday, 1 January 2024, 00:00 UTC
SECOND_NS: Final = 1_000_000_000
DAY_SECONDS: Final = 86_400
_STRETCH: Final = 20
"""Windows that are made at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Traits:
    """What makes a fleet hard to judge, all of it without any drift.

    Attributes:
        ar: correlation of a row with the one before.
        offset_sd: of the units' offsets, in each column.
        scale_sd: of the logarithm of the units' scales, in each column.
        chatty: how many times as many rows the first device sends.
        cycle: amplitude of a sine over the day, in the same phase everywhere.
        cycle_sd: of the logarithm of the units' own amplitudes around ``cycle``.
        factor: share of variance that blocks of five columns have in common.
        shapes: of the last columns, each one of `SHAPES`; the others are plain.
    """

    ar: float = 0.0
    offset_sd: float = 0.0
    scale_sd: float = 0.0
    chatty: int = 1
    cycle: float = 0.0
    cycle_sd: float = 0.0
    factor: float = 0.0
    shapes: tuple[str, ...] = ()


SCENARIOS: Final[Mapping[str, Traits]] = {
    "iid": Traits(),
    "ar": Traits(ar=0.8),
    "heterogeneous": Traits(offset_sd=0.3, scale_sd=0.2),
    "chatty": Traits(chatty=20),
    "together": Traits(ar=0.8, offset_sd=0.3, scale_sd=0.2, chatty=20),
    "cycle": Traits(cycle=0.5),
    "cycle-varied": Traits(cycle=0.5, cycle_sd=0.5),
    "correlated": Traits(factor=0.6),
    "mixed": Traits(offset_sd=0.1, shapes=SHAPES),
    "everything": Traits(
        ar=0.8,
        offset_sd=0.3,
        scale_sd=0.2,
        chatty=20,
        cycle=0.5,
        cycle_sd=0.5,
        factor=0.3,
        shapes=SHAPES,
    ),
}


@dataclass(frozen=True, slots=True)
class _Habits:
    """What one unit keeps for ever, (F, 1, 1) each."""

    offset: Values
    scale: Values
    amplitude: Values


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Devices that run one model, the units that it was trained on, and the faults that befall some.

    ``rows`` is per window, of a device that is not chatty; ``reference_windows`` come before window 0 and are free of
    faults. ``groups`` training units of ``group_rows`` rows each, which cover a day, come from the devices' population.
    The model is a logistic function of the first four columns: two weights, and an interaction of the third and the
    fourth. With a ``sureness`` above 1 its scores are surer than its answers are right.
    """

    seed: int = 0
    traits: Traits = SCENARIOS["iid"]
    faults: tuple[Fault, ...] = ()
    devices: int = 40
    features: int = 30
    rows: int = 250
    windows: int = 40
    reference_windows: int = 0
    window_seconds: int = 3600
    groups: int = 6
    group_rows: int = 2400
    labelled: bool = False
    sureness: float = 1.0

    def __post_init__(self) -> None:
        if self.features - len(self.traits.shapes) < 4:
            raise ValueError("the model needs four plain columns")
        unknown = set(self.traits.shapes) - set(SHAPES)
        if unknown:
            raise ValueError(f"shapes {sorted(unknown)}: known are {', '.join(SHAPES)}")
        if self.traits.factor and any(fault.kind == "correlation" for fault in self.faults):
            raise ValueError(
                "a fault of correlation would change the marginals of columns with a common factor"
            )

    # ── names ──────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The columns: ``f0``, ``f1`` …"""
        return tuple(f"f{j}" for j in range(self.features))

    @cached_property
    def device_ids(self) -> tuple[DeviceId, ...]:
        """The devices, in order."""
        return tuple(DeviceId(f"device-{i:04d}") for i in range(self.devices))

    @cached_property
    def shapes(self) -> tuple[str, ...]:
        """The shape of each column."""
        return ("plain",) * (self.features - len(self.traits.shapes)) + self.traits.shapes

    def rows_of(self, device: int) -> int:
        """Rows a window of this device."""
        return self.rows * (self.traits.chatty if device == 0 else 1)

    # ── rows ───────────────────────────────────────────────────────────────────────────────────────────

    def stream(self, device: int) -> Iterator[Stretch]:
        """All windows of one device in order, history first, a few at a time."""
        windows = range(-self.reference_windows, self.windows)
        spacing = self.window_seconds / self.rows_of(device)
        mine = [fault for fault in self.faults if device in fault.hit(self.devices)]
        faulty = Faulty(mine, np.random.default_rng([self.seed, 2, device]))
        for stretch in self._unit(1, device, self.rows_of(device), windows, spacing):
            faulty.apply(stretch)
            yield stretch

    @cached_property
    def training(self) -> tuple[tuple[Values, NDArray[np.int64]], ...]:
        """Rows (n, F) and labels (n,) of each training unit; its rows are spread over one day."""
        found = []
        for group in range(self.groups):
            spacing = DAY_SECONDS / self.group_rows
            (stretch,) = self._unit(0, group, self.group_rows, range(1), spacing)
            stretch.settle()
            found.append((stretch.values.reshape(self.features, -1).T, stretch.labels.ravel()))
        return tuple(found)

    def _habits(self, population: int, unit: int) -> _Habits:
        rng = np.random.default_rng([self.seed, population, unit, 1])
        draws = rng.standard_normal((3, self.features, 1, 1), dtype=np.float32)
        traits = self.traits
        return _Habits(
            offset=traits.offset_sd * draws[0],
            scale=np.exp(traits.scale_sd * draws[1]),
            amplitude=traits.cycle * np.exp(traits.cycle_sd * draws[2]),
        )

    def _unit(self, population: int, unit: int, n: int, windows: range, spacing: float) -> Iterator[Stretch]:
        """The unit's windows of ``n`` rows each, ``spacing`` seconds apart, without faults."""
        rng = np.random.default_rng([self.seed, population, unit])
        habits = self._habits(population, unit)
        source = Source(rng, self.features, ar=self.traits.ar, factor=self.traits.factor)
        for first in range(windows.start, windows.stop, _STRETCH):
            count = min(_STRETCH, windows.stop - first)
            values = source.take(count * n).reshape(self.features, count, n)
            for fault in self.faults if population else ():
                if fault.kind == "correlation" and unit in fault.hit(self.devices):
                    a, b = fault.columns
                    part = part_of(fault, first, count)
                    values[b, part] *= np.float32(np.sqrt(1 - fault.size**2))
                    values[b, part] += np.float32(fault.size) * values[a, part]
            at = first * n + 0.5 + np.arange(count * n, dtype=np.float64).reshape(count, n)
            seconds = at * spacing
            values *= habits.scale
            values += habits.offset
            if self.traits.cycle:
                day = np.sin(2 * np.pi / DAY_SECONDS * seconds).astype(np.float32)
                values += habits.amplitude * day
            for j, shape in enumerate(self.shapes):
                if shape != "plain":
                    values[j] = shaped(shape, values[j])
            luck = rng.random((count, n), dtype=np.float32)
            labels = np.empty(luck.shape, np.int64)
            yield Stretch(first=first, values=values, labels=labels, seconds=seconds, luck=luck)

    # ── counts ─────────────────────────────────────────────────────────────────────────────────────────

    @cached_property
    def spec(self) -> CellSpec:
        """The layout, of the training units' rows."""
        rows = np.concatenate([rows for rows, _ in self.training])
        columns: list[FeatureCells] = [
            category_cells(name, len(CATEGORIES))
            if shape == "category"
            else cells_from_training(name, rows[:, j])
            for j, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True))
        ]
        best = np.abs(probability(rows.T, self.sureness) - 0.5) + np.float32(0.5)
        return CellSpec(tuple(columns), cells_from_training("score", best), len(LABELS))

    @cached_property
    def info(self) -> ArtifactInfo:
        """What the artifact says about itself, one reference per training unit; there is no graph behind it."""
        groups = tuple(
            (f"unit-{i}", self._profiles(rows.T[:, None])[0]) for i, (rows, _) in enumerate(self.training)
        )
        golden = np.ascontiguousarray(self.training[0][0][:32])
        labels, scores = answer(golden.T, self.sureness)
        features = tuple(
            Feature(name=name, missing=True, kind="category", vocabulary=CATEGORIES, unseen=True)
            if shape == "category"
            else Feature(name=name, missing=True)
            for name, shape in zip(self.names, self.shapes, strict=True)
        )
        manifest = Manifest(
            name=ids.model_name("streams"),
            version="1",
            task="classifier",
            score="predict_proba",
            features=features,
            labels=LABELS,
            input_name="rows",
            label_output="label",
            score_output="scores",
            opset=21,
            ir_version=10,
            layout=self.spec.layout,
            training_digest=ids.digest_of(b"".join(rows.tobytes() for rows, _ in self.training)),
        )
        total = merge_all(self.spec, [profile for _, profile in groups], probabilities=True)
        return ArtifactInfo(
            manifest=manifest,
            reference=Reference(spec=self.spec, total=total, groups=groups),
            golden=Golden(rows=golden, labels=labels, scores=scores.astype(np.float64)),
            certificate={},
            opset=21,
            ir_version=10,
        )

    @cached_property
    def slices(self) -> tuple[Slice, ...]:
        """The windows to judge, in order."""
        return self._read[self.reference_windows :]

    @cached_property
    def reference(self) -> tuple[Slice, ...]:
        """Known-good history of the same devices, oldest first."""
        return self._read[: self.reference_windows]

    def count(self, told: Callable[[Stretch], None]) -> None:
        """Counts all rows now; each stretch is shown to ``told`` as it passes, device after device."""
        self.__dict__["_read"] = self._count(told)

    @cached_property
    def _read(self) -> tuple[Slice, ...]:
        return self._count(lambda _: None)

    def _count(self, told: Callable[[Stretch], None]) -> tuple[Slice, ...]:
        columns = [self._readings(device, told) for device in range(self.devices)]
        return tuple(
            Slice(
                index=k if k < self.reference_windows else k - self.reference_windows,
                start_ns=readings[0].start_ns,
                end_ns=readings[0].end_ns,
                readings=readings,
            )
            for k, readings in enumerate(zip(*columns, strict=True))
        )

    def _readings(self, device: int, told: Callable[[Stretch], None]) -> list[Reading]:
        found: list[Reading] = []
        binner = Binner(self.spec, probabilities=True)
        for stretch in self.stream(device):
            told(stretch)
            labels, _ = answer(stretch.values, self.sureness)
            correct = (labels == stretch.labels).sum(axis=1)
            for i, profile in enumerate(self._profiles(stretch.values, binner)):
                start = EPOCH_NS + (stretch.first + i) * self.window_seconds * SECOND_NS
                found.append(
                    Reading(
                        device=self.device_ids[device],
                        profile=profile,
                        start_ns=start,
                        end_ns=start + self.window_seconds * SECOND_NS,
                        labelled=profile.rows if self.labelled else 0,
                        correct=int(correct[i]) if self.labelled else 0,
                    )
                )
        return found

    def _profiles(self, values: Values, binner: Binner | None = None) -> list[Profile]:
        """One profile for each window of ``values`` (F, windows, rows)."""
        binner = binner or Binner(self.spec, probabilities=True)
        labels, scores = answer(values, self.sureness)
        found = []
        for w in range(values.shape[1]):
            binner.observe(values[:, w].T, labels[w], scores[w])
            found.append(binner.take())
        return found

    # ── files ──────────────────────────────────────────────────────────────────────────────────────────

    def write(self, path: Path, reference: Path | None = None) -> None:
        """Writes the rows as Parquet: ``device``, ``time``, the columns, and ``label`` where they are labelled.

        Windows before 0 go to ``reference``, or nowhere. Devices follow one another, each in the order of time.
        """
        with pq.ParquetWriter(path, self._schema) as data:
            history = pq.ParquetWriter(reference, self._schema) if reference else None
            for device in range(self.devices):
                for stretch in self.stream(device):
                    old = min(max(0, -stretch.first), stretch.values.shape[1])
                    if history and old:
                        history.write_table(self._table(device, stretch, slice(0, old)))
                    if old < stretch.values.shape[1]:
                        data.write_table(self._table(device, stretch, slice(old, None)))
            if history:
                history.close()

    def write_training(self, path: Path) -> None:
        """Writes the training rows as Parquet: ``unit``, the columns and ``label``."""
        units = np.repeat([f"unit-{i}" for i in range(self.groups)], self.group_rows)
        rows = np.concatenate([rows for rows, _ in self.training])
        labels = np.concatenate([labels for _, labels in self.training])
        columns = {"unit": pa.array(units), **self._columns(rows.T), "label": _texts(labels, LABELS)}
        pq.write_table(pa.table(columns), path)

    @cached_property
    def _schema(self) -> Any:
        columns = [("device", pa.string()), ("time", pa.timestamp("us", tz="UTC"))]
        columns += [
            (name, pa.string() if shape == "category" else pa.float32())
            for name, shape in zip(self.names, self.shapes, strict=True)
        ]
        return pa.schema([*columns, ("label", pa.string())] if self.labelled else columns)

    def _columns(self, values: Values) -> dict[str, Any]:
        return {
            name: _texts(values[j], CATEGORIES) if shape == "category" else pa.array(values[j])
            for j, (name, shape) in enumerate(zip(self.names, self.shapes, strict=True))
        }

    def _table(self, device: int, stretch: Stretch, part: slice) -> Any:
        seconds = stretch.seconds[part].ravel()
        times = (EPOCH_NS // 1000 + np.rint(seconds * 1e6)).astype("datetime64[us]")
        columns = {
            "device": pa.array([self.device_ids[device]] * len(seconds)),
            "time": pa.array(times, pa.timestamp("us", tz="UTC")),
            **self._columns(stretch.values[:, part].reshape(self.features, -1)),
        }
        if self.labelled:
            columns["label"] = _texts(stretch.labels[part].ravel(), LABELS)
        return pa.table(columns, schema=self._schema)


def _texts(codes: NDArray[Any], names: Sequence[str]) -> Any:
    """Codes as text; missing ones as null, and others as ``new``."""
    known = np.isin(codes, np.arange(len(names)))
    texts = np.asarray([*names, "new"], object)[np.where(known, codes, len(names)).astype(int)]
    return pa.array(texts, pa.string(), mask=np.isnan(codes.astype(np.float64)))

"""What an artifact says about itself, and a reader of it that needs neither onnx nor onnxruntime.

An artifact is an ordinary ``.onnx`` file. Its ``metadata_props`` carry, under ``skiff.*`` keys, the manifest, the
reference profile, the parity certificate and the golden rows, each as JSON text.
"""

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import ids
from edge_runtime.contract.codec import pack_counts, unpack_counts
from edge_runtime.contract.errors import ArtifactError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import ModelName
from edge_runtime.contract.onnx_metadata import MAX_METADATA_BYTES, read_metadata
from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile

SCHEMA: Final = 1
KEYS: Final = ("skiff.manifest", "skiff.profile", "skiff.certificate", "skiff.golden")
TOLERANCE: Final = 1e-5
"""Scores agree when they differ by at most this, absolutely or relative to the reference."""

Label = int | float | str | bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One input column: its name, and whether the pipeline accepts missing values (NaN) in it."""

    name: str
    missing: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Limits the publisher declares for the model; 0 means none. The device's own budgets apply besides."""

    predict_p99_ns: int = 0
    rss_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a device must know to run an artifact.

    The graph has one input ``input_name`` (n, F) float32. A classifier's outputs are ``label_output`` (n,) int64,
    an index into ``labels``, and ``score_output`` (n, C) float32; a regressor has ``score_output`` (n, 1) float32
    and an empty ``label_output``. ``score`` says which method of the pipeline the score stands for.
    """

    name: ModelName
    version: str
    task: str
    score: str
    features: tuple[Feature, ...]
    labels: tuple[Label, ...]
    input_name: str
    label_output: str
    score_output: str
    opset: int
    ir_version: int
    layout: ids.LayoutId
    training_digest: ids.Digest
    libraries: tuple[tuple[str, str], ...] = ()
    budgets: Budgets = Budgets()

    @property
    def probabilities(self) -> bool:
        """Whether the scores are class probabilities."""
        return self.score == "predict_proba"


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The training data as counts: the layout, all rows together, and one profile per group where given."""

    spec: CellSpec
    total: Profile
    groups: tuple[tuple[str, Profile], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """Rows (n, F) float32 with the pipeline's own answers: labels (n,) int64 indices and scores (n, C) float64."""

    rows: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class ArtifactInfo:
    """Everything skiff wrote into an artifact; ``certificate`` is the parity report as plain JSON data."""

    manifest: Manifest
    reference: Reference
    golden: Golden
    certificate: Mapping[str, object]
    opset: int
    ir_version: int


def agrees(
    scores: NDArray[np.floating], reference: NDArray[np.floating], tolerance: float = TOLERANCE
) -> NDArray[np.bool_]:
    """Elementwise: whether ``scores`` equal ``reference`` within the project's tolerance; NaN equals NaN.

    An infinity equals itself only.
    """
    found, wanted = scores.astype(np.float64), reference.astype(np.float64)
    with np.errstate(invalid="ignore"):
        close = np.abs(found - wanted) <= tolerance * np.maximum(1.0, np.abs(wanted))
    close &= np.isfinite(wanted)  # relative to infinity everything would be close
    agreed: NDArray[np.bool_] = close | (found == wanted) | (np.isnan(found) & np.isnan(wanted))
    return agreed


def ties(scores: NDArray[np.floating]) -> NDArray[np.bool_]:
    """``(n,)``: whether the two best of each row's scores (n, C) lie within `TOLERANCE`: then either label is right."""
    if scores.shape[1] < 2:
        return np.zeros(len(scores), np.bool_)
    best = np.partition(scores.astype(np.float64), -2, axis=1)
    with np.errstate(invalid="ignore"):
        return np.asarray(best[:, -1] - best[:, -2] <= TOLERANCE)


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode("ascii")


def _array_document(array: NDArray[np.generic], dtype: str) -> dict[str, object]:
    return {
        "dtype": dtype,
        "shape": list(array.shape),
        "data": _b64(np.ascontiguousarray(array).astype(dtype).tobytes()),
    }


def _blob(f: Fields, name: str) -> bytes:
    try:
        return base64.b64decode(f.text(name, max_length=MAX_METADATA_BYTES), validate=True)
    except ValueError as e:
        raise f.fail(name, f"is not base64 ({e})") from e


def _read_array(f: Fields, dtype: str) -> NDArray[np.generic]:
    f.text("dtype", choices=(dtype,))
    shape = f.integers("shape")
    if any(size > MAX_METADATA_BYTES for size in shape):
        raise f.fail("shape", f"{list(shape)} is too large")
    data = _blob(f, "data")
    wanted = int(np.prod(shape, dtype=np.float64)) * np.dtype(dtype).itemsize
    if len(shape) > 2 or len(data) != wanted:
        raise f.fail("data", f"holds {len(data)} bytes; shape {list(shape)} of {dtype} needs {wanted}")
    return np.frombuffer(data, dtype).reshape(shape)


def _profile_document(profile: Profile) -> dict[str, object]:
    return {
        "rows": profile.rows,
        "counts": _b64(pack_counts(profile.counts)),
        "sums": profile.sums.tolist(),
    }


def _read_profile(f: Fields, spec: CellSpec) -> Profile:
    return Profile(
        layout=spec.layout,
        rows=f.integer("rows"),
        counts=unpack_counts(_blob(f, "counts"), max_counters=spec.size),
        sums=np.asarray(f.integers("sums"), np.int64),
    ).check(spec)


def _cells_document(cells: FeatureCells) -> dict[str, object]:
    return {"name": cells.name, "edges": _b64(np.asarray(cells.edges, "<f4").tobytes())}


def _read_cells(f: Fields) -> FeatureCells:
    raw = _blob(f, "edges")
    if len(raw) % 4:
        raise f.fail("edges", "is not a list of float32 values")
    return FeatureCells(f.text("name"), tuple(float(x) for x in np.frombuffer(raw, "<f4")))


def to_metadata(
    manifest: Manifest, reference: Reference, golden: Golden, certificate: Mapping[str, object]
) -> dict[str, str]:
    """The ``metadata_props`` of an artifact; raises `ArtifactError` when they pass `MAX_METADATA_BYTES`."""
    documents: dict[str, object] = {
        "skiff.manifest": {
            "schema": SCHEMA,
            "name": manifest.name,
            "version": manifest.version,
            "task": manifest.task,
            "score": manifest.score,
            "features": [{"name": f.name, "missing": f.missing} for f in manifest.features],
            "labels": list(manifest.labels),
            "input": manifest.input_name,
            "label_output": manifest.label_output,
            "score_output": manifest.score_output,
            "opset": manifest.opset,
            "ir_version": manifest.ir_version,
            "layout": manifest.layout,
            "training_digest": manifest.training_digest,
            "libraries": dict(manifest.libraries),
            "budgets": {
                "predict_p99_ns": manifest.budgets.predict_p99_ns,
                "rss_bytes": manifest.budgets.rss_bytes,
            },
        },
        "skiff.profile": {
            "classes": reference.spec.classes,
            "features": [_cells_document(c) for c in reference.spec.features],
            "score": _cells_document(reference.spec.score),
            "total": _profile_document(reference.total),
            "groups": {name: _profile_document(p) for name, p in reference.groups},
        },
        "skiff.certificate": dict(certificate),
        "skiff.golden": {
            "rows": _array_document(golden.rows, "<f4"),
            "labels": _array_document(golden.labels, "<i8"),
            "scores": _array_document(golden.scores, "<f8"),
        },
    }
    found = {k: json.dumps(d, sort_keys=True, separators=(",", ":")) for k, d in documents.items()}
    size = sum(len(k) + len(v.encode()) for k, v in found.items())
    if size > MAX_METADATA_BYTES:
        sizes = ", ".join(f"{k} {len(v.encode())}" for k, v in found.items())
        raise ArtifactError(
            f"metadata of {size} bytes is larger than the {MAX_METADATA_BYTES} allowed ({sizes}); "
            "use fewer groups, golden rows or features"
        )
    return found


def read_info(model: bytes) -> ArtifactInfo:
    """Reads what skiff wrote into the bytes of an ``.onnx`` file; raises `ArtifactError`.

    Nothing of the graph is loaded or trusted.
    """
    metadata, opset, ir_version = read_metadata(model)
    documents: dict[str, Fields] = {}
    for key in KEYS:
        if key not in metadata:
            raise ArtifactError(f"not a skiff artifact: {key} is missing; make one with converters.convert")
        try:
            documents[key] = Fields(json.loads(metadata[key]), key, ArtifactError)
        except (ValueError, RecursionError) as e:
            raise ArtifactError(f"{key}: not JSON ({e})") from e
    try:
        manifest = _read_manifest(documents["skiff.manifest"])
        reference = _read_reference(documents["skiff.profile"])
    except ContractError as e:
        raise ArtifactError(f"skiff metadata: {e}") from e
    golden = _read_golden(documents["skiff.golden"], manifest)
    if reference.spec.layout != manifest.layout:
        raise ArtifactError(
            f"skiff.profile has layout {reference.spec.layout}, the manifest says {manifest.layout}"
        )
    names = tuple(f.name for f in manifest.features)
    if tuple(c.name for c in reference.spec.features) != names:
        raise ArtifactError("skiff.profile and skiff.manifest name different features")
    if reference.spec.classes != len(manifest.labels):
        raise ArtifactError(
            f"skiff.profile has {reference.spec.classes} classes, the manifest {len(manifest.labels)}"
        )
    if manifest.opset != opset or manifest.ir_version != ir_version:
        raise ArtifactError("skiff.manifest: opset or IR version differ from the graph's own")
    certificate = json.loads(metadata["skiff.certificate"])
    return ArtifactInfo(
        manifest=manifest,
        reference=reference,
        golden=golden,
        certificate=certificate,
        opset=opset,
        ir_version=ir_version,
    )


def _read_manifest(f: Fields) -> Manifest:
    schema = f.integer("schema")
    if schema != SCHEMA:
        raise ArtifactError(f"skiff.manifest: schema {schema} is not {SCHEMA}: update the older side")
    labels = f.items("labels")
    for i, label in enumerate(labels):
        if not isinstance(label, int | float | str | bool):
            raise f.fail(f"labels[{i}]", "is not a number, text or truth value")
    budgets = f.section("budgets", {})
    task = f.text("task", choices=("classifier", "regressor"))
    if (task == "classifier") != bool(labels):
        raise f.fail("labels", f"a {task} with {len(labels)} labels")
    label_output = f.text("label_output")
    if bool(label_output) != bool(labels):
        raise f.fail("label_output", f"{label_output!r} for a {task}")
    score = f.text("score", choices=("predict_proba", "decision_function", "predict"))
    if task == "regressor" and score != "predict":
        raise f.fail("score", f"{score!r} for a {task}")
    features = tuple(
        Feature(name=g.text("name"), missing=g.flag("missing", False)) for g in f.sections("features")
    )
    if not features or len({feature.name for feature in features}) != len(features):
        raise f.fail("features", "there must be at least one, each with a name of its own")
    return Manifest(
        name=ids.model_name(f.text("name")),
        version=f.text("version", pattern=ids.VERSION),
        task=task,
        score=score,
        features=features,
        labels=tuple(label for label in labels if isinstance(label, int | float | str | bool)),
        input_name=f.text("input"),
        label_output=label_output,
        score_output=f.text("score_output"),
        opset=f.integer("opset", low=1),
        ir_version=f.integer("ir_version", low=1),
        layout=ids.layout_id(f.text("layout")),
        training_digest=ids.digest(f.text("training_digest")),
        libraries=f.pairs("libraries", {}),
        budgets=Budgets(
            predict_p99_ns=budgets.integer("predict_p99_ns", 0), rss_bytes=budgets.integer("rss_bytes", 0)
        ),
    )


def _read_reference(f: Fields) -> Reference:
    spec = CellSpec(
        features=tuple(_read_cells(g) for g in f.sections("features")),
        score=_read_cells(f.section("score")),
        classes=f.integer("classes"),
    )
    groups = f.section("groups", {})
    return Reference(
        spec=spec,
        total=_read_profile(f.section("total"), spec),
        groups=tuple((name, _read_profile(groups.section(name), spec)) for name in sorted(groups.names())),
    )


def _read_golden(f: Fields, manifest: Manifest) -> Golden:
    rows = _read_array(f.section("rows"), "<f4").astype(np.float32)
    labels = _read_array(f.section("labels"), "<i8").astype(np.int64)
    scores = _read_array(f.section("scores"), "<f8").astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(manifest.features) or not len(rows):
        raise ArtifactError(
            f"skiff.golden: rows have shape {rows.shape}; {len(manifest.features)} features are needed"
        )
    if labels.shape != (len(rows),) or scores.ndim != 2 or len(scores) != len(rows):
        raise ArtifactError(f"skiff.golden: {len(rows)} rows, labels {labels.shape}, scores {scores.shape}")
    if labels.min() < 0 or labels.max() >= max(1, len(manifest.labels)):
        raise ArtifactError(
            f"skiff.golden: labels must be indices of the {len(manifest.labels)} in the manifest"
        )
    return Golden(rows=rows, labels=labels, scores=scores)

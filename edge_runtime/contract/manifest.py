"""What an artifact says about itself, and a reader of it that needs neither onnx nor onnxruntime.

An artifact is an ordinary ``.onnx`` file. Its ``metadata_props`` carry, under ``skiff.*`` keys, the manifest, the
reference profile, the parity certificate and the golden rows, each as JSON text.
"""

import base64
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from edge_runtime.contract import ids
from edge_runtime.contract.errors import ArtifactError, ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest, ModelName
from edge_runtime.contract.onnx_metadata import MAX_METADATA_BYTES, read_metadata
from edge_runtime.contract.packing import pack_planes, unpack_counts
from edge_runtime.contract.profile import CellSpec, FeatureCells, Profile

SCHEMA: Final = 1
TASKS: Final = ("classifier", "regressor", "clusterer", "outlier_detector")
SCORES: Final = ("predict_proba", "decision_function", "predict", "negative_distance")
KINDS: Final = ("number", "category")
INPUT_DTYPES: Final = ("float32", "float64")
KEYS: Final = ("skiff.manifest", "skiff.profile", "skiff.certificate", "skiff.golden")
TOLERANCE: Final = 1e-5
"""Scores agree when they differ by at most this, absolutely or relative to the reference."""

Label = int | float | str | bool

_GOLDEN_DTYPES: Final = {"float32": "<f4", "float64": "<f8"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Feature:
    """One input column.

    A ``category`` column travels in the packed numeric rows as its code: the index of the value in ``vocabulary``, -1
    for any other value, NaN for a missing one. Values are compared as Python compares them, so that 1, 1.0 and True are
    one value and the text "1" another.

    Attributes:
        name: as in the training data.
        missing: whether the pipeline accepts missing values (NaN) here.
        kind: ``number`` or ``category``.
        vocabulary: the values of a category, each once; empty for a number.
        unseen: whether values outside ``vocabulary`` are accepted.
        infinite: whether a number may be infinite.
        low, high: the range, its ends included, in which the model is proven for a number and used; other rows are
            refused. Values of the manifest's ``input_dtype``; None for no limit.
    """

    name: str
    missing: bool = False
    kind: str = "number"
    vocabulary: tuple[Label, ...] = ()
    unseen: bool = False
    infinite: bool = False
    low: float | None = None
    high: float | None = None

    @property
    def ranged(self) -> bool:
        """Whether a value may be too small or too large."""
        return self.low is not None or self.high is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Budgets:
    """Limits the publisher declares for the model; 0 means none. The device's own budgets apply besides."""

    predict_p99_ns: int = 0
    rss_bytes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a device must know to run an artifact.

    The graph has one input ``input_name`` (n, F) of ``input_dtype``. A classifier, a clusterer and an outlier detector
    answer ``label_output`` (n,) int64, an index into ``labels``, and ``score_output`` (n, C) float32; a regressor has
    ``score_output`` (n, C) float32, one column per target, and an empty ``label_output``. A classifier with K label
    outputs has ``multilabels`` instead of ``labels``: ``label_output`` is (n, K), column k an index into
    ``multilabels[k]``, and the scores are the outputs' blocks side by side: one column per label of each output, or one
    per output.

    Attributes:
        task: one of `TASKS`.
        score: the method of the pipeline that the score stands for, one of `SCORES`. C is the number of labels for
            ``predict_proba`` and ``predict`` (1 for the predicted label, 0 for the others); ``negative_distance`` is
            minus the distance to each centre of a clusterer.
        input_dtype: ``float32``, or ``float64`` where the pipeline's answers need it.
        undefined: whether the pipeline itself answers some rows with NaN. Where it does not, a NaN score means that the
            pipeline refuses the row.
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
    input_dtype: str = "float32"
    multilabels: tuple[tuple[Label, ...], ...] = ()
    undefined: bool = False

    @property
    def probabilities(self) -> bool:
        """Whether the scores are probabilities of the classes of one output, which a profile sums."""
        return self.score == "predict_proba" and not self.multilabels

    @property
    def outputs(self) -> tuple[tuple[Label, ...], ...]:
        """The labels of each label output: one for most models, none for a regressor."""
        return self.multilabels or ((self.labels,) if self.labels else ())


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """The training data as counts: the layout, all rows together, and one profile per group where given."""

    spec: CellSpec
    total: Profile
    groups: tuple[tuple[str, Profile], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Golden:
    """Rows (n, F) of the manifest's ``input_dtype``, packed as the graph reads them, with the pipeline's own answers.

    ``labels`` are indices, (n,) int64, or (n, K) for K label outputs; ``scores`` are (n, C) float64.
    """

    rows: NDArray[np.floating]
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


def ties(scores: NDArray[np.floating], *, signed: bool = False) -> NDArray[np.bool_]:
    """``(n,)``: whether the two best of each row's scores (n, C) lie within the tolerance: then either label is right.

    The gap is compared with `TOLERANCE`, relative to the best score where that is larger than 1. One column ties with
    nothing, unless it is ``signed``: the sign of a decision value chooses between two labels, which tie near 0.
    """
    wide = scores.astype(np.float64)
    if wide.shape[1] < 2:
        return np.asarray((np.abs(wide) <= TOLERANCE).any(axis=1) & signed)
    best = np.partition(wide, -2, axis=1)
    second, first = best[:, -2], best[:, -1]
    with np.errstate(invalid="ignore"):
        close = first - second <= TOLERANCE * np.maximum(1.0, np.abs(first))
    # Relative to infinity everything would be close.
    return np.asarray((close & np.isfinite(first)) | (first == second))


def unsure(manifest: Manifest, scores: NDArray[np.floating]) -> NDArray[np.bool_]:
    """Whether either label is right, by `undecided` of the scores (n, C): (n,), or (n, K) for K label outputs."""
    found = undecided(manifest.score, manifest.outputs, scores)
    return found if manifest.multilabels else found[:, 0]


def undecided(
    score: str, outputs: Sequence[Sequence[Label]], scores: NDArray[np.floating]
) -> NDArray[np.bool_]:
    """``(n, K)``: for each of the K label ``outputs``, whether the scores (n, C) leave either label right, by `ties`.

    Where each of several outputs has one column, the column chooses between two labels: a decision value by its sign, a
    probability by whether it passes a half. ``score`` is the method that the scores stand for.
    """
    signed = score == "decision_function"
    if len(outputs) < 2:
        return ties(scores, signed=signed)[:, None]
    sizes = [len(labels) for labels in outputs]
    if scores.shape[1] == sum(sizes):
        blocks = np.split(scores, np.cumsum(sizes)[:-1], axis=1)
        return np.stack([ties(block) for block in blocks], axis=1)
    if score not in ("decision_function", "predict_proba"):
        return np.zeros(scores.shape, np.bool_)
    middle = 0.0 if signed else 0.5
    return np.asarray(np.abs(scores.astype(np.float64) - middle) <= TOLERANCE)


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
        "counts": _b64(pack_planes(profile.counts)),
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
    return FeatureCells(f.text("name"), tuple(np.frombuffer(raw, "<f4").tolist()))


def _feature_document(feature: Feature) -> dict[str, object]:
    """What differs from a plain number is written only where it does, so that older artifacts keep their bytes."""
    found: dict[str, object] = {"name": feature.name, "missing": feature.missing}
    if feature.kind != "number":
        found |= {"kind": feature.kind, "vocabulary": list(feature.vocabulary), "unseen": feature.unseen}
    if feature.infinite:
        found["infinite"] = True
    if feature.low is not None:
        found["low"] = feature.low
    if feature.high is not None:
        found["high"] = feature.high
    return found


def _optional_document(manifest: Manifest) -> dict[str, object]:
    found: dict[str, object] = {}
    if manifest.input_dtype != "float32":
        found["input_dtype"] = manifest.input_dtype
    if manifest.multilabels:
        found["multilabels"] = [list(labels) for labels in manifest.multilabels]
    if manifest.undefined:
        found["undefined"] = True
    return found


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
            "features": [_feature_document(f) for f in manifest.features],
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
            **_optional_document(manifest),
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
            "rows": _array_document(golden.rows, _GOLDEN_DTYPES[manifest.input_dtype]),
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


def manifest_digest(model: bytes) -> Digest:
    """SHA-256 of the manifest's text in the bytes of an ``.onnx`` file; raises `ArtifactError` when it has none."""
    metadata, _, _ = read_metadata(model)
    if "skiff.manifest" not in metadata:
        raise ArtifactError("not a skiff artifact: skiff.manifest is missing")
    return ids.digest_of(metadata["skiff.manifest"].encode())


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
    task = f.text("task", choices=TASKS)
    labels = _labels(f, "labels", f.items("labels"))
    multilabels = tuple(_labels(f, "multilabels", x) for x in f.items("multilabels", ()))
    if (task == "regressor") == bool(labels or multilabels):
        raise f.fail("labels", f"a {task} with {len(labels) + len(multilabels)} labels")
    if multilabels and (labels or task != "classifier" or not all(multilabels)):
        raise f.fail(
            "multilabels", "only a classifier has them, instead of labels, at least one for each output"
        )
    label_output = f.text("label_output")
    if bool(label_output) != bool(labels or multilabels):
        raise f.fail("label_output", f"{label_output!r} for a {task}")
    score = f.text("score", choices=SCORES)
    if task == "regressor" and score != "predict":
        raise f.fail("score", f"{score!r} for a {task}")
    budgets = f.section("budgets", {})
    input_dtype = f.text("input_dtype", "float32", choices=INPUT_DTYPES)
    features = tuple(_read_feature(g, input_dtype) for g in f.sections("features"))
    if not features or len({feature.name for feature in features}) != len(features):
        raise f.fail("features", "there must be at least one, each with a name of its own")
    return Manifest(
        name=ids.model_name(f.text("name")),
        version=f.text("version", pattern=ids.VERSION),
        task=task,
        score=score,
        features=features,
        labels=labels,
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
        input_dtype=input_dtype,
        multilabels=multilabels,
        undefined=f.flag("undefined", False),
    )


def _labels(f: Fields, name: str, found: object) -> tuple[Label, ...]:
    if not isinstance(found, list):
        raise f.fail(name, "holds something that is not a list of labels")
    for i, label in enumerate(found):
        if not isinstance(label, int | float | str | bool):
            raise f.fail(f"{name}[{i}]", "is not a number, text or truth value")
    return tuple(found)


def _read_feature(f: Fields, input_dtype: str) -> Feature:
    vocabulary = _labels(f, "vocabulary", f.items("vocabulary", ()))
    if len(set(vocabulary)) != len(vocabulary) or any(
        isinstance(value, float) and math.isnan(value) for value in vocabulary
    ):
        raise f.fail("vocabulary", "each value must be there once, and NaN is a missing value")
    feature = Feature(
        name=f.text("name"),
        missing=f.flag("missing", False),
        kind=f.text("kind", "number", choices=KINDS),
        vocabulary=vocabulary,
        unseen=f.flag("unseen", False),
        infinite=f.flag("infinite", False),
        low=_read_limit(f, "low", input_dtype),
        high=_read_limit(f, "high", input_dtype),
    )
    if feature.kind == "number" and (vocabulary or feature.unseen):
        raise f.fail("kind", "a number has no vocabulary and no unseen values")
    if feature.kind == "category" and feature.infinite:
        raise f.fail("infinite", "a category is not infinite")
    if feature.kind == "category" and feature.ranged:
        raise f.fail("low" if feature.high is None else "high", "a category has no range")
    if feature.low is not None and feature.high is not None and feature.low > feature.high:
        raise f.fail("low", f"{feature.low} is larger than high, {feature.high}")
    return feature


def _read_limit(f: Fields, name: str, input_dtype: str) -> float | None:
    """An end of a range, or None; a device compares rows with it as it stands, so it must be a value they can have."""
    if name not in f.names():
        return None
    value = f.number(name)
    with np.errstate(over="ignore"):
        if float(np.dtype(input_dtype).type(value)) != value:
            raise f.fail(name, f"{value!r} is no {input_dtype} number")
    return value


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
    dtype = _GOLDEN_DTYPES[manifest.input_dtype]
    rows = _read_array(f.section("rows"), dtype).astype(manifest.input_dtype)
    labels = _read_array(f.section("labels"), "<i8").astype(np.int64)
    scores = _read_array(f.section("scores"), "<f8").astype(np.float64)
    if rows.ndim != 2 or rows.shape[1] != len(manifest.features) or not len(rows):
        raise ArtifactError(
            f"skiff.golden: rows have shape {rows.shape}; {len(manifest.features)} features are needed"
        )
    shape = (len(rows), len(manifest.multilabels)) if manifest.multilabels else (len(rows),)
    if labels.shape != shape or scores.ndim != 2 or len(scores) != len(rows):
        raise ArtifactError(f"skiff.golden: {len(rows)} rows, labels {labels.shape}, scores {scores.shape}")
    sizes = [len(found) for found in manifest.outputs] or [1]
    if (labels < 0).any() or (labels.reshape(len(rows), -1) >= sizes).any():
        counts = ", ".join(str(size) for size in sizes)
        raise ArtifactError(f"skiff.golden: labels must be indices of the {counts} in the manifest")
    return Golden(rows=rows, labels=labels, scores=scores)

"""A publisher for tests: small proven artifacts, a repository with cheap keys, signed releases."""

import base64
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key
from onnx import ModelProto
from sklearn.ensemble import RandomForestClassifier
from sklearn.linear_model import LogisticRegression

from converters.artifact import convert
from edge_runtime.contract import codec, ids
from edge_runtime.contract.ids import Digest, digest_of
from edge_runtime.contract.manifest import Budgets
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import EVERYONE, Release, to_payload
from trainer.publish import Repository

FLEET = ids.fleet_id("fleet-1")
COHORT = ids.cohort_id("main")
MODEL = ids.model_name("toy")
DEVICE = ids.device_id("device-1")


@functools.cache
def artifact(*, seed: int = 0, trees: int = 0, name: str = "toy", budgets: Budgets | None = None) -> bytes:
    """A proven artifact: a logistic regression of 4 features, or a forest (60 trees make several chunks)."""
    rng = np.random.default_rng(seed)
    X = rng.normal(size=(600, 4)).astype(np.float32)
    y = (X @ rng.normal(size=(4, 3))).argmax(axis=1)
    estimator = RandomForestClassifier(trees, random_state=seed) if trees else LogisticRegression()
    with tempfile.TemporaryDirectory() as folder:
        made = convert(
            estimator.fit(X, y),
            X,
            Path(folder) / "m.onnx",
            name=name,
            version=f"1.{seed}",
            probes=500,
            budgets=budgets or Budgets(),
        )
        return made.path.read_bytes()


def with_golden_changed(data: bytes) -> bytes:
    """The same graph with golden rows that promise other scores: what a publisher's mistake would look like."""
    model = ModelProto.FromString(data)
    [golden] = [prop for prop in model.metadata_props if prop.key == "skiff.golden"]
    document = json.loads(golden.value)
    scores = np.frombuffer(base64.b64decode(document["scores"]["data"]), "<f8").copy()
    scores[0] += 0.01
    document["scores"]["data"] = base64.b64encode(scores.tobytes()).decode()
    golden.value = json.dumps(document, sort_keys=True, separators=(",", ":"))
    return bytes(model.SerializeToString())


def put(folder: Path, data: bytes) -> Path:
    """``data`` as a file."""
    path = folder / f"{digest_of(data)[:8]}.onnx"
    path.write_bytes(data)
    return path


def director(repository: Repository) -> tuple[str, Ed25519PrivateKey]:
    """The director's key id and key, read as the coordinator reads them."""
    document = json.loads(repository.director_key.read_bytes())
    key = load_pem_private_key(document["private_key_pem"].encode(), None)
    assert isinstance(key, Ed25519PrivateKey)
    return document["keyid"], key


def release(candidate: Digest | None, *, revision: int = 1, **changes) -> Release:
    """A release of ``candidate`` to everyone, with ``changes``."""
    fields = {
        "fleet": FLEET,
        "cohort": COHORT,
        "model": MODEL,
        "rollout": ids.rollout_id("rollout-1"),
        "revision": revision,
        "threshold": EVERYONE,
        "candidate": candidate,
        "incumbent": None,
    }
    return Release(**{**fields, **changes})


def signed(repository: Repository, document: Release | bytes) -> bytes:
    """The release as message bytes, signed by the repository's director."""
    payload = document if isinstance(document, bytes) else to_payload(document)
    keyid, key = director(repository)
    return codec.encode(SignedRelease(payload=payload, signatures=((keyid, key.sign(payload)),)))

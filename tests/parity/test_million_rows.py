"""A million hostile rows for each family of trees, made without the converters' own probes; and a million of those."""

import json
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from onnx import ModelProto
from sklearn.pipeline import make_pipeline

from converters import convert
from edge_runtime.engine import Engine
from tests.parity.tree_cases import FAMILIES, TREES, WORDS, framed, target_of, training_rows
from tests.support import thresholds

pytestmark = pytest.mark.sampled(2)

TOLERANCE = 1e-5  # the project's, written out: this test trusts no helper of what it judges
MILLION = 1_000_000
MIB = 2**20
CHUNK = 20_000


@dataclass(slots=True)
class Tally:
    rows: int = 0
    refused: int = 0
    ties: int = 0
    wrong_labels: int = 0
    wrong_scores: int = 0
    worst: float = 0.0
    examples: list[str] = field(default_factory=list)


class Fitted:
    """A case with its pipeline, its artifact and its edges."""

    def __init__(self, case, path):
        rows, y = training_rows(case)
        given: Any = rows
        words: Any = np.where(np.isnan(rows[:, 1]), None, WORDS[np.nan_to_num(rows[:, 1] / 1.5).astype(int)])
        if case.categories == "frame":
            given = pd.DataFrame(rows, columns=list("abcdef"))
            given["b"] = pd.Categorical(words)
        pipeline = (
            make_pipeline(*(scaler() for scaler in case.scalers), case.model) if case.scalers else case.model
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # how well a power fits is no matter here
            self.pipeline = pipeline.fit(given, target_of(case, y))
        convert(self.pipeline, given, path, probes=100, input_dtype=case.dtype)
        self.engine = Engine(path)
        self.manifest = self.engine.info.manifest
        self.vocabulary: tuple[Any, ...] = self.manifest.features[1].vocabulary
        rng = np.random.default_rng(1)
        if self.vocabulary:
            codes: dict[Any, float] = {word: float(code) for code, word in enumerate(self.vocabulary)}
            rows[:, 1] = [np.nan if word is None else codes[word] for word in words.tolist()]
        self.rows = rows.astype(case.dtype)
        splits = thresholds.splits_of(
            self.pipeline, self.rows, rng, self.given(self.rows) if self.vocabulary else None
        )
        self.edges = thresholds.edges_of(self.pipeline, splits, self.rows)
        self.splits = len(splits.base)

    def given(self, rows):
        return framed(rows, self.vocabulary) if self.vocabulary else rows.astype(np.float64)

    def chunks(self, count, seed):
        """``count`` rows: of ten, five at an edge, two at several edges, three of all other kinds."""
        rng = np.random.default_rng(seed)
        features = self.manifest.features
        can = {name: np.array([getattr(f, name) for f in features]) for name in ("missing", "infinite")}
        done = 0
        while done < count:
            size = min(CHUNK, count - done)
            many, several = size // 2, size // 5
            at_edges = thresholds.at_edges(self.rows, self.edges, done // 2, many)
            lattice = thresholds.on_a_lattice(self.rows, self.edges, several, rng)
            wild = thresholds.wild(self.rows, size - many - several, rng, **can)
            if self.vocabulary:
                wild[:, 1] = rng.integers(-1, len(self.vocabulary), len(wild))
            if self.vocabulary and can["missing"][1]:
                wild[rng.random(len(wild)) < 0.1, 1] = np.nan
            yield np.concatenate([at_edges, lattice, wild])
            done += size


# --- the verdict ------------------------------------------------------------------------------------------------


def taken(pipeline, rows):
    """Which rows scikit-learn takes: a scaler refuses what overflows on its way, trees what has no float32."""
    if thresholds.last(pipeline) is pipeline and not thresholds.narrows(pipeline):
        return np.ones(len(rows), bool)
    made = thresholds.before(pipeline, rows)
    with np.errstate(over="ignore"):
        made = made.astype(np.float32) if thresholds.narrows(thresholds.last(pipeline)) else made
    return ~np.isinf(made).any(axis=1)


def compare(fitted, rows, tally):
    kept = taken(fitted.pipeline, rows)
    tally.refused += int((~kept).sum())
    rows = rows[kept]
    manifest, given = fitted.manifest, fitted.given(rows)
    found, scores = fitted.engine.run(rows)
    with warnings.catch_warnings(), np.errstate(all="ignore"):
        warnings.simplefilter("ignore")
        predicted = fitted.pipeline.predict(given)
        wanted = (
            predicted if manifest.task == "regressor" else getattr(fitted.pipeline, manifest.score)(given)
        )
    wanted = np.asarray(wanted, np.float64).reshape(len(rows), -1)
    assert scores.shape == wanted.shape
    assert np.isfinite(wanted).all()
    relative = np.abs(scores - wanted) / np.maximum(1.0, np.abs(wanted))
    wrong = ~(relative <= TOLERANCE).all(axis=1)
    tally.rows += len(rows)
    tally.wrong_scores += int(wrong.sum())
    tally.worst = max(tally.worst, float(relative.max(initial=0.0)))
    if found is not None:
        ranked = np.sort(wanted, axis=1)
        tied = np.abs(ranked[:, -1] - ranked[:, -2] if wanted.shape[1] > 1 else wanted[:, 0]) <= TOLERANCE
        names = np.array(manifest.labels, dtype=object)
        differs = (names[found] != predicted.astype(object)) & ~tied
        tally.ties += int(tied.sum())
        tally.wrong_labels += int(differs.sum())
        wrong |= differs
    for i in np.flatnonzero(wrong)[: 5 - len(tally.examples)]:
        tally.examples.append(f"{rows[i].tolist()}: {scores[i]} for {wanted[i]}")


def compared(cases, rows, folder):
    """The tally over all ``cases``, ``rows`` rows in all that scikit-learn takes."""
    total = Tally()
    for i, case in enumerate(cases):
        fitted = Fitted(case, folder / f"{i}.onnx")
        assert fitted.splits * 0.9 <= len(fitted.edges.base), "most splits have an edge in the raw column"
        goal = -(-rows * (i + 1) // len(cases))
        seed = 0
        while total.rows < goal:
            for chunk in fitted.chunks(goal - total.rows, seed):
                compare(fitted, chunk, total)
            seed += 1
        print(f"{case}: {total}")
        fitted.engine.close()
    return total


def verify(total, rows):
    assert total.rows >= rows
    assert (total.wrong_labels, total.wrong_scores) == (0, 0), total
    assert total.refused < 0.25 * rows
    assert total.ties < 0.25 * rows


QUICK = ("random-forest", "histogram-boosting")
"""The families that the short run tries, too; `test_parity_families` has all of them, with fewer rows."""


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_a_million_rows_of_each_family_agree(family, tmp_path):
    verify(compared(FAMILIES[family], MILLION, tmp_path), MILLION)


@pytest.mark.parametrize(
    "family", [f if f in QUICK else pytest.param(f, marks=pytest.mark.slow) for f in FAMILIES]
)
def test_rows_of_each_family_agree(family, tmp_path):
    verify(compared(FAMILIES[family][:4], 20_000, tmp_path), 20_000)


def test_a_single_threshold_off_by_one_value_is_seen(tmp_path):
    fitted = Fitted(TREES[1], tmp_path / "m.onnx")
    model = ModelProto.FromString((tmp_path / "m.onnx").read_bytes())
    [node] = model.graph.node
    [modes] = [a for a in node.attribute if a.name == "nodes_modes"]
    [values] = [a for a in node.attribute if a.name == "nodes_values"]
    inner = [i for i, mode in enumerate(modes.strings) if mode == b"BRANCH_LEQ"]
    sound = list(values.floats)
    rounds = thresholds.TRIES * len(thresholds.OFFSETS) * len(fitted.edges.base)
    [rows] = fitted.chunks(2 * rounds, 0)  # half of them lie at edges
    noticed = []
    for i in inner:
        for direction in (-np.inf, np.inf):
            values.floats[i] = np.nextafter(np.float32(sound[i]), np.float32(direction))
            noticed.append(wrong_labels(fitted, model, rows) > 0)
            values.floats[i] = sound[i]
    assert wrong_labels(fitted, model, rows) == 0
    assert np.mean(noticed) > 0.95, noticed


def wrong_labels(fitted, model, rows):
    fitted.engine, tally = Engine(model.SerializeToString()), Tally()
    compare(fitted, rows, tally)
    return tally.wrong_labels


@pytest.mark.slow
def test_a_million_probes_of_a_hundred_deep_trees_fit_into_memory():
    """Rows come and go in chunks: what grows with their number is the answer to each kind, a few numbers."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.many_probes", str(MILLION)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    calls = found.pop("calls")
    print({name: round(value, 1) for name, value in found.items()}, f"{len(calls)} calls")
    assert found["depth"] >= 15
    assert found["splits"] > 50_000
    assert found["rows"] >= MILLION
    assert found["wrong"] == 0
    proof = [call for call in calls if call[0] == "prove"]
    amounts = [amount for _, amount, _, _ in proof]
    totals = {total for _, _, total, _ in proof}
    assert amounts == sorted(amounts)
    assert len(proof) > 100
    assert totals == {amounts[-1]}
    assert amounts[-1] >= MILLION
    # The probe rows alone would be 80 MB in float32 and as much again in each of the float64 copies and answers.
    assert proof[-1][3] - proof[0][3] < 32 * MIB
    assert found["peak_bytes"] - found["before_bytes"] < 400 * MIB

"""The fleet verdict on real rows: smart-watches on the wrist the model was trained for, and on the other one."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from aggregator.config import DriftConfig
from aggregator.core import drift
from aggregator.records import Block
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.profile import Binner, CellSpec, cells_from_training
from tests.support.fleet import A
from trainer.datasets import LEFT, RIGHT, WatchData, load_watch

CONFIG = DriftConfig(attributes=("wrist",))
WRISTS = {LEFT: "left", RIGHT: "right"}
PEOPLE = range(1, 11)


class Story:
    """A forest trained on people 1 to 6, left wrist, and twenty watches that replay their recordings."""

    def __init__(self) -> None:
        self.watch = load_watch()
        training = self.watch.select(people=tuple(range(1, 7)), wrists=(LEFT,))
        forest = RandomForestClassifier(60, max_depth=8, min_samples_leaf=40, random_state=0, n_jobs=1)
        self.forest = forest.fit(training.features, training.labels)
        top = self.forest.predict_proba(training.features).max(axis=1)
        self.spec = CellSpec(
            tuple(
                cells_from_training(n, training.features[:, j]) for j, n in enumerate(training.feature_names)
            ),
            cells_from_training("score", top),
            len(self.watch.label_names),
        )
        groups = tuple((f"person-{p}", self.block(p, LEFT, training, "g").profile) for p in range(1, 7))
        total = groups[0][1]
        for _, profile in groups[1:]:
            total = total.merge(profile)
        self.reference = Reference(spec=self.spec, total=total, groups=groups)

    def block(self, person: int, wrist: int, rows: WatchData, name: str = "watch", number: int = 1) -> Block:
        rows = rows.device_rows(person, wrist)
        scores = self.forest.predict_proba(rows.features).astype(np.float32)
        labels = scores.argmax(axis=1).astype(np.int64)
        binner = Binner(self.spec, probabilities=True)
        binner.observe(rows.features, labels, scores)
        return Block(
            device=DeviceId(f"{name}-{person}-{WRISTS[wrist]}"),
            profile=binner.take(),
            windows=1,
            rows=len(rows),
            seconds=1.0,
            labelled=len(rows),
            correct=int((labels == rows.labels).sum()),
            first=number,
            last=number,
        )

    def replay(self, wrists: tuple[int, ...], rng: np.random.Generator, number: int) -> list[Block]:
        """One block per watch: all of its recordings but one, another one each time."""
        blocks = []
        for wrist in wrists:
            for person in PEOPLE:
                parts = self.watch.device_rows(person, wrist)
                recordings = np.unique(parts.recording)
                left_out = rng.choice(recordings)
                blocks.append(
                    self.block(person, wrist, parts.take(parts.recording != left_out), number=number)
                )
        return blocks

    def judge(self, blocks, *, baseline=None, origins=None) -> drift.Findings:
        attributes = {b.device: {"wrist": b.device.rpartition("-")[2]} for b in blocks}
        look = drift.Look(
            digest=A,
            reference=self.reference,
            labels=self.watch.label_names,
            blocks=tuple(blocks),
            attributes=attributes,
            baseline=baseline,
            origins=origins or {},
        )
        return drift.judge(look, CONFIG)


@pytest.fixture(scope="module")
def story():
    return Story()


def test_the_trained_wrist_is_stable_look_after_look(story):
    rng = np.random.default_rng(0)
    first = story.replay((LEFT,), rng, 1)
    findings = story.judge(first)
    baseline, origins = findings.baseline, {b.device: b.profile for b in first}
    assert len(baseline) == 10
    for number in range(2, 12):
        findings = story.judge(story.replay((LEFT,), rng, number), baseline=baseline, origins=origins)
        for (cohort, kind), judgement in findings.judgements.items():
            assert judgement.outcome == drift.STABLE, (cohort, kind, judgement)


def test_the_other_wrist_is_found_named_and_costs_accuracy(story):
    rng = np.random.default_rng(1)
    baseline = story.judge(story.replay((LEFT,), rng, 1)).baseline
    for number in range(2, 7):
        findings = story.judge(story.replay((LEFT, RIGHT), rng, number), baseline=baseline)
        outcome = {key: judgement.outcome for key, judgement in findings.judgements.items()}
        assert outcome["wrist=right", "skew"] == drift.MOVED
        assert outcome["wrist=left", "skew"] == drift.STABLE
        assert outcome["wrist=right", "performance"] == drift.MOVED
        assert outcome["wrist=left", "performance"] == drift.STABLE
        judged = findings.judgements["wrist=right", "skew"]
        assert judged.exact
        assert judged.p <= 2 / 8008
        assert set(judged.moved) & {"accel_x_mean", "accel_x_min", "accel_x_max"}


def test_seen_from_the_start_the_other_wrist_is_kept_out_of_the_baseline(story):
    findings = story.judge(story.replay((LEFT, RIGHT), np.random.default_rng(2), 1))
    assert {unit.device.rpartition("-")[2] for unit in findings.baseline} == {"left"}
    assert findings.judgements["wrist=right", "performance"].outcome == drift.MOVED

"""The judge on real rows: smart-watches on the wrist the model was trained for, and on the other one."""

import numpy as np
import pytest
from sklearn.ensemble import RandomForestClassifier

from aggregator.config import DriftConfig
from aggregator.core.judge import Judge
from aggregator.looks import Reading, Slice
from edge_runtime.contract import ids
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import ArtifactInfo, Feature, Golden, Manifest, Reference
from edge_runtime.contract.profile import Binner, CellSpec, Profile, cells_from_training, merge_all
from trainer.datasets import LEFT, RIGHT, WatchData, load_watch

pytestmark = pytest.mark.sampled(2)

CONFIG = DriftConfig(attributes=("wrist",))
WRISTS = {LEFT: "left", RIGHT: "right"}
PEOPLE = range(1, 11)
MINUTE = 60_000_000_000


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
        groups = tuple((f"person-{p}", self.count(training.device_rows(p, LEFT))[0]) for p in range(1, 7))
        golden = training.features[:8].astype(np.float32)
        scores = self.forest.predict_proba(golden)
        self.info = ArtifactInfo(
            manifest=Manifest(
                name=ids.model_name("watch"),
                version="1",
                task="classifier",
                score="predict_proba",
                features=tuple(Feature(name=name) for name in training.feature_names),
                labels=tuple(self.watch.label_names),
                input_name="rows",
                label_output="label",
                score_output="scores",
                opset=21,
                ir_version=10,
                layout=self.spec.layout,
                training_digest=ids.digest_of(training.features.tobytes()),
            ),
            reference=Reference(
                spec=self.spec,
                total=merge_all(self.spec, [profile for _, profile in groups], probabilities=True),
                groups=groups,
            ),
            golden=Golden(rows=golden, labels=scores.argmax(axis=1), scores=scores),
            certificate={},
            opset=21,
            ir_version=10,
        )
        self.attributes = {
            DeviceId(f"watch-{person}-{name}"): {"wrist": name}
            for person in PEOPLE
            for name in WRISTS.values()
        }

    def count(self, rows: WatchData) -> tuple[Profile, int]:
        """The profile of the rows, and how many the forest gets right."""
        scores = self.forest.predict_proba(rows.features).astype(np.float32)
        labels = scores.argmax(axis=1).astype(np.int64)
        binner = Binner(self.spec, probabilities=True)
        binner.observe(rows.features, labels, scores)
        return binner.take(), int((labels == rows.labels).sum())

    def look(
        self, wrists: tuple[int, ...], rng: np.random.Generator, number: int, *, labelled: bool
    ) -> Slice:
        """One reading per watch: all of its recordings but one, another one each time."""
        start = number * 10 * MINUTE
        readings = []
        for wrist in wrists:
            for person in PEOPLE:
                rows = self.watch.device_rows(person, wrist)
                left_out = rng.choice(np.unique(rows.recording))
                profile, correct = self.count(rows.take(rows.recording != left_out))
                readings.append(
                    Reading(
                        device=DeviceId(f"watch-{person}-{WRISTS[wrist]}"),
                        profile=profile,
                        start_ns=start,
                        end_ns=start + 10 * MINUTE,
                        labelled=profile.rows if labelled else 0,
                        correct=correct if labelled else 0,
                    )
                )
        return Slice(index=number, start_ns=start, end_ns=start + 10 * MINUTE, readings=tuple(readings))

    def judge(self) -> Judge:
        """As the monitor judges: each look covers what a watch does in a cycle."""
        return Judge(self.info, CONFIG, attributes=self.attributes, settle=0, block_looks=1)

    def play(self, seed: int, joins: int, looks: int, *, labelled: bool) -> Judge:
        """The left watches, and from look ``joins`` on the right ones too."""
        judge, rng = self.judge(), np.random.default_rng(seed)
        for number in range(looks):
            wrists = (LEFT, RIGHT) if number >= joins else (LEFT,)
            judge.look(self.look(wrists, rng, number, labelled=labelled))
        return judge


@pytest.fixture(scope="module")
def story():
    return Story()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_trained_wrist_is_stable_look_after_look(story, seed):
    judge = story.play(seed, 99, 16, labelled=True)
    assert judge.alarms == ()
    assert judge.wishes == ()


@pytest.mark.parametrize(
    "labelled", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["labels", "no-labels"]
)
def test_the_other_wrist_is_found_named_and_costs_accuracy(story, labelled):
    judge = story.play(2, 10, 16, labelled=labelled)
    right = [a for a in judge.alarms if a.cohort == "wrist=right"]
    assert {a.feature for a in right if a.kind == "skew"} & {"accel_x_mean", "accel_x_min", "accel_x_max"}
    assert {a.kind for a in right} & {"performance", "prediction"}
    if labelled:
        (accuracy,) = [a for a in right if a.kind == "performance"]
        evidence = dict(accuracy.evidence)
        assert evidence["to"] < evidence["from"] - 0.1
        assert accuracy.severity == "page"
    assert {a.opened_window for a in right} <= {10, 11, 12}
    assert {d for a in right for d in a.devices} == {d for d in story.attributes if d.endswith("right")}
    assert not [a for a in judge.alarms if a.cohort == "wrist=left"]
    assert "wrist=right" in {wish.cohort for wish in judge.wishes}


def test_seen_from_the_start_the_other_wrist_is_skewed_and_the_trained_one_is_not(story):
    judge = story.play(3, 0, 4, labelled=True)
    assert {a.kind for a in judge.alarms if a.cohort == "wrist=right"} == {"skew"}
    assert not [a for a in judge.alarms if a.cohort == "wrist=left"]
    smallest = min(dict(a.evidence)["p"] for a in judge.alarms if a.cohort == "wrist=right")
    assert smallest <= 2 / 8008

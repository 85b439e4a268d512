"""What ``skiff retrain`` reads from the aggregator's request, and what it tells of the weights."""

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from aggregator.core import retrain
from aggregator.looks import Block, Reading, Wish
from cli import operate, output
from cli.app import app
from cli.retraining import Reweight, aim_of, read_request, tell_made
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import digest_of
from edge_runtime.contract.manifest import read_info
from edge_runtime.contract.profile import empty_profile
from edge_runtime.engine import Engine
from tests.support.counted import cells, counted
from tests.support.tiny_models import classifier
from trainer.aimed import Outcome, Trial
from trainer.publish import Repository
from trainer.release import Made
from trainer.reweight import reweight

DIGEST = classifier().digest
NAMES = tuple(f"f{j:02}" for j in range(15))


def rows(seed, shift=0.0):
    return np.random.default_rng(seed).normal(shift, 1.0, size=(400, 15))


@pytest.fixture(scope="module")
def layout():
    return cells(rows(0), NAMES)


def request(profiles, cohort="fleet"):
    blocks = [
        Block(
            reading=Reading(device=ids.device_id(f"dev-{at}"), profile=profile, start_ns=0, end_ns=1),
            seconds=1.0,
            first=1,
            last=9,
        )
        for at, profile in enumerate(profiles)
    ]
    attributes = {block.reading.device: {"wrist": "right"} for block in blocks}
    wish = Wish(window=3, cohort=cohort, why="inputs moved, accuracy moved")
    return retrain.request(
        ids.FleetId("demo"), ids.model_name("tiny"), DIGEST, wish, (), blocks, attributes, 0
    )


@pytest.fixture
def path(tmp_path, layout):
    found = tmp_path / "request-1.json"
    found.write_text(request([counted(layout, rows(seed, 0.5)) for seed in range(1, 7)]).document)
    return found


def test_the_aggregators_request_gives_the_devices_histograms(path, layout):
    asked = read_request(path)
    assert (asked.digest, asked.cohort) == (DIGEST, "fleet")
    assert asked.why == "fleet: inputs moved, accuracy moved"
    found = aim_of(asked, layout, Reweight.auto)
    assert found is not None
    assert list(found.devices) == [counted(layout, rows(seed, 0.5)) for seed in range(1, 7)]
    assert (found.insist, found.every, found.others) == (False, False, False)


def test_a_request_of_one_cohort_keeps_the_other_devices_in_mind(tmp_path, layout):
    path = tmp_path / "request.json"
    path.write_text(request([counted(layout, rows(1))], cohort="wrist=right").document)
    found = aim_of(read_request(path), layout, Reweight.auto)
    assert found is not None
    assert found.others


@pytest.mark.parametrize(("wanted", "every"), [(Reweight.moved, False), (Reweight.every, True)])
def test_who_asks_for_weights_gets_them_or_a_refusal(path, layout, wanted, every):
    found = aim_of(read_request(path), layout, wanted)
    assert found is not None
    assert (found.insist, found.every) == (True, every)


def test_nobody_is_aimed_at_when_that_is_off(path, layout):
    assert aim_of(read_request(path), layout, Reweight.off) is None


def test_devices_without_rows_or_of_another_layout_are_left_out(tmp_path, layout, capsys):
    other = cells(rows(3), NAMES)
    path = tmp_path / "request.json"
    path.write_text(request([counted(other, rows(1)), empty_profile(layout, probabilities=False)]).document)
    asked = read_request(path)
    assert aim_of(asked, layout, Reweight.auto) is None
    assert f"no histogram of layout {layout.layout}" in capsys.readouterr().err
    with pytest.raises(ConfigError, match=f"--reweight moved: .*no histogram of layout {layout.layout}"):
        aim_of(asked, layout, Reweight.moved)


@pytest.mark.parametrize(
    ("key", "value"), [("counts", "AAAA"), ("counts", "no base64!"), ("rows", 399), ("sums", [1, 2])]
)
def test_a_damaged_histogram_is_refused_with_its_place(path, layout, key, value):
    document = json.loads(path.read_text())
    document["devices"][4][key] = value
    path.write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=r"request-1\.json\.devices\[4\]\.counts: is no histogram"):
        aim_of(read_request(path), layout, Reweight.auto)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"digest": "x"}', '{"digest": 1, "cohort": "fleet"}'])
def test_what_is_no_request_is_refused_by_name(tmp_path, text):
    path = tmp_path / "other.json"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"other\.json"):
        read_request(path)
    with pytest.raises(ConfigError, match=r"none\.json: not a retrain request"):
        read_request(tmp_path / "none.json")


def made(outcome):
    artifact: Any = None  # what is told of it is told elsewhere
    return Made(
        artifact=artifact,
        evaluation=(("held-out rows", 0.75),),
        measure="accuracy",
        training_rows=9,
        outcome=outcome,
    )


def test_it_tells_what_the_weights_do_feature_by_feature(path, layout, capsys, monkeypatch):
    monkeypatch.setattr(output.out, "width", 100)
    asked = read_request(path)
    found = reweight(layout, rows(0), [counted(layout, rows(seed, 0.3)) for seed in range(6)])
    trial = Trial(measure="accuracy", plain=0.7, reweighted=0.8, effective=123.0)
    tell_made(made(Outcome(reweighting=found, used=True, trial=trial)), asked)
    told = capsys.readouterr().out
    assert "accuracy on held-out rows: 0.750" in told
    assert f"fleet: training rows re-weighted to 6 devices in {len(found.fitted)} of 15 features" in told
    assert f"400 rows say as much as {found.effective:.0f}, largest weight {found.largest:.2f}" in told
    assert "accuracy 0.8000 instead of 0.7000 (123 effective rows)" in told
    worst = found.fitted[0]
    assert f"{worst.name}" in told
    assert f"{worst.before:.3f}" in told
    assert "and 3 more features" in told


def test_it_tells_why_rows_count_alike(path, layout, capsys):
    asked = replace(read_request(path), cohort="wrist=right")
    found = reweight(layout, rows(0), [counted(layout, rows(1))])
    tell_made(made(Outcome(reweighting=found, used=False, why="they look like the fleet as they are")), asked)
    assert (
        capsys.readouterr().out.splitlines()[1]
        == "wrist=right: training rows count alike: they look like the fleet as they are"
    )


def test_without_an_aim_only_the_evaluation_is_told(path, capsys):
    tell_made(made(None), read_request(path))
    assert capsys.readouterr().out == "accuracy on held-out rows: 0.750\n"


# ── the command ────────────────────────────────────────────────────────────────────────────────────────

RUN = CliRunner()
SPEC = """
name = "tiny"
version = "{version}"
[data]
source = "rows.npz"
target = "y"
[model]
kind = "tree"
scaler = "none"
max_depth = 1
[conversion]
probes = 300
"""


def truth(X):
    return np.where((X[:, 0] < -1.0) | (X[:, 0] > 2.0), "up", "down")


def seen(seed, mean):
    rng = np.random.default_rng(seed)
    return np.stack([rng.normal(mean, 0.5, 400), rng.normal(size=400)], axis=1)


@pytest.fixture
def workshop(tmp_path, monkeypatch):
    """Version 1 of a model, published; the orders that a retrain gives end in the list that comes with it."""
    rng = np.random.default_rng(0)
    X = np.stack([rng.uniform(-3.0, 3.0, 3000), rng.normal(size=3000)], axis=1)
    np.savez(
        tmp_path / "rows.npz", features=X.astype(np.float32), feature_names=np.array(["a", "b"]), y=truth(X)
    )
    for version in (1, 2):
        (tmp_path / f"train-{version}.toml").write_text(SPEC.format(version=version))
    repository = Repository.create(tmp_path / "repository")
    repository.enable_auto(ids.model_name("tiny"))
    assert (
        RUN.invoke(app, ["train", str(tmp_path / "train-1.toml"), "-o", str(tmp_path / "one.onnx")]).exit_code
        == 0
    )
    repository.add(tmp_path / "one.onnx", role="auto")
    (tmp_path / "aggregator.toml").write_text(
        'fleet = "demo"\nstate_dir = "state"\nregistry = "repository/targets"\n'
        'director_key = "repository/keys/director.json"\n[broker]\nhost = "127.0.0.1"\n'
    )
    orders: list[tuple[str, str]] = []

    def order(_, kind, document, *, by, why):
        assert (kind, by) == ("start_rollout", "retrain")
        orders.append((document["candidate"], why))
        return "r-1"

    monkeypatch.setattr(operate, "send", lambda *_, **__: 0)
    monkeypatch.setattr(operate, "order", order)
    return tmp_path, orders


def answered(folder, mean, *more):
    """``skiff retrain`` on the request of a fleet whose feature ``a`` is at ``mean``."""
    info = read_info((folder / "one.onnx").read_bytes())
    layout = info.reference.spec
    blocks = [
        Block(
            reading=Reading(
                device=ids.device_id(f"dev-{at}"),
                profile=counted(layout, seen(at, mean)),
                start_ns=0,
                end_ns=1,
            ),
            seconds=1.0,
            first=1,
            last=9,
        )
        for at in range(12)
    ]
    digest = digest_of((folder / "one.onnx").read_bytes())
    wish = Wish(window=3, cohort="fleet", why="moved")
    found = retrain.request(ids.FleetId("demo"), ids.model_name("tiny"), digest, wish, (), blocks, {}, 0)
    (folder / "request.json").write_text(found.document)
    options = {"--spec": "train-2.toml", "-o": "two.onnx", "-r": "repository", "-a": "aggregator.toml"}
    words = [word for name, value in options.items() for word in (name, str(folder / value))]
    return RUN.invoke(app, ["retrain", str(folder / "request.json"), *words, *more])


def accuracy(path):
    rows = np.concatenate([seen(seed, 1.8) for seed in range(100, 105)])
    labels, _ = Engine(path).run(rows.astype(np.float32))
    names = np.asarray(read_info(path.read_bytes()).manifest.labels)
    return float((names[labels] == truth(rows)).mean())


def test_the_command_makes_publishes_and_offers_a_model_that_is_right_where_the_fleet_is(workshop):
    folder, orders = workshop
    done = answered(folder, 1.8)
    assert done.exit_code == 0, done.output
    assert "training rows re-weighted to 12 devices in 1 of 2 features" in done.stdout
    assert accuracy(folder / "one.onnx") < 0.7
    assert accuracy(folder / "two.onnx") > 0.95
    [(digest, why)] = orders
    assert digest == digest_of((folder / "two.onnx").read_bytes())
    assert why == "fleet: moved"
    first, second = (read_info((folder / f"{name}.onnx").read_bytes()) for name in ("one", "two"))
    assert second.manifest.layout == first.manifest.layout


def test_off_leaves_the_rows_alike(workshop):
    folder, orders = workshop
    done = answered(folder, 1.8, "--reweight", "off")
    assert done.exit_code == 0, done.output
    assert "weighted" not in done.stdout
    assert accuracy(folder / "two.onnx") < 0.7
    assert len(orders) == 1


def test_a_fleet_that_no_row_stands_for_is_refused_and_nothing_is_offered(workshop):
    folder, orders = workshop
    done = answered(folder, 6.0, "--reweight", "moved")
    assert done.exit_code == 1
    assert "a: 100%, mostly above 2.99" in done.stderr
    assert "collect labelled rows there" in done.stderr
    assert orders == []
    assert not (folder / "two.onnx").exists()

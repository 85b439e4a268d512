"""The pages on the aggregator's file and on training specs have every key that is read, with its default."""

import json
import re

import pytest

from aggregator.config import reference
from aggregator.config.reference import Noted
from edge_runtime.contract.fields import REQUIRED
from trainer import spec

WATCH = {"source": "watch", "people": [1]}
MODELS = [{"kind": kind} for kind in spec.KINDS]


def test_the_page_on_the_aggregators_file_is_up_to_date(repository):
    written = (repository / "docs/reference/aggregator.md").read_text(encoding="utf-8")
    assert written == reference.text(), (
        "run python -m aggregator.config.reference > docs/reference/aggregator.md"
    )


def test_every_key_of_the_aggregators_file_has_a_meaning_and_no_other():
    found = [key.dotted for key in reference.every_key()]
    assert sorted(found) == sorted(reference.WHY)
    assert {key.section for key in reference.every_key()} == set(reference.SECTIONS)
    gates = {key.name: key for key in reference.every_key() if key.section == "rollout.gates"}
    assert (gates["max_bad_row_rate"].default, gates["max_bad_row_rate"].allowed) == (0.01, "0 to 1")
    assert "| `max_bad_row_rate` | `0.01` | 0 to 1 |" in reference.text()


def test_a_key_without_a_meaning_makes_no_page(monkeypatch):
    monkeypatch.setattr(reference, "WHY", {})
    with pytest.raises(KeyError, match="director_key"):
        reference.text()


@pytest.fixture
def asked(monkeypatch, tmp_path):
    """What a training spec is asked for, by section: every key's default, without the estimators' parameters."""
    noted = []

    def reader(mapping, path, error):
        noted.append(Noted(mapping, path, error))
        return noted[-1]

    monkeypatch.setattr(spec, "Fields", reader)
    table = {"source": "rows.csv", "target": "label", "group": "device"}
    documents = [(WATCH, {"people": [2]}), (table, {"fraction": 0.5}), (table, {"groups": ["a"]})]
    for data, evaluation in documents:
        document = {"name": "m", "version": "1", "data": data, "evaluation": evaluation, "model": MODELS[0]}
        spec.read(document, "spec", tmp_path)
    parameters = {name for kind in spec.KINDS.values() for name in kind}
    return {
        key.dotted: key.default
        for fields in noted
        for key in fields.keys
        if not (key.section == "model" and key.name in parameters)
    }


def rows(page):
    """Each row of the page's tables by its dotted key: the cells after it."""
    found = {}
    section, counts = "", False
    for line in page.splitlines():
        if line.startswith("| Key |"):
            counts = line.startswith("| Key | Default |")
        elif heading := re.fullmatch(r"## (?:`\[(.+)\]`|Top)", line):
            section = heading[1] or ""
        elif counts and (row := re.fullmatch(r"\| `(\S+)` \| (.*) \|", line)):
            found[f"{section}.{row[1]}".removeprefix(".")] = row[2].split(" | ")
    return found


def test_the_page_on_training_has_every_key_and_its_default(repository, asked):
    page = rows((repository / "docs/reference/training.md").read_text(encoding="utf-8"))
    listed = {key: cells[0] for key, cells in page.items()}
    asked = asked | {"conversion.ranges": {}}
    assert set(listed) == set(asked)
    for key, default in asked.items():
        if default is REQUIRED:
            assert listed[key] == "required", key
        elif default in ((), {}, ""):
            assert not listed[key].startswith("`"), key
        else:
            assert listed[key] == f"`{json.dumps(default)}`", key


def test_the_page_on_training_has_every_parameter_and_its_limits(repository):
    text = (repository / "docs/reference/training.md").read_text(encoding="utf-8")
    for kind, parameters in spec.KINDS.items():
        [line] = [line for line in text.splitlines() if line.startswith(f"| `{kind}` |")]
        assert set(re.findall(r"`(\w+)`", line.split(" | ", 1)[1])) == set(parameters)
    for name, p in {name: p for kind in spec.KINDS.values() for name, p in kind.items()}.items():
        limits = f"whole, {p.low:g} to {p.high:,.0f}" if p.whole else f"{p.low:g} to {p.high:g}"
        assert f"| `{name}` | {limits} |" in text
    for scaler in spec.SCALERS:
        assert f"`{scaler}`" in text

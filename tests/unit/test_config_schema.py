"""The schema that editors read says what the reader does, and its file is up to date."""

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config import keys as config_keys
from edge_runtime.config import schema as config_schema
from edge_runtime.contract.errors import ConfigError
from tests.support.json_schema import is_valid

SCHEMA = config_schema.schema()
CONFIGS = sorted((Path(__file__).parents[2] / "device_configs").glob("*.toml"))
MINIMAL: dict[str, Any] = {
    "device": {"id": "d", "fleet": "f", "state_dir": "s"},
    "broker": {},
    "model": {"name": "m", "trust_root": "r"},
}


def reads(document):
    try:
        config_keys.read(document, "file")
    except ConfigError:
        return False
    return True


def with_value(section, key, value):
    document = copy.deepcopy(MINIMAL)
    table(document, section)[key] = value
    return document


def table(document: dict[str, Any], section: str) -> Any:
    """The table of that dotted name, made where there is none; a stray one where something else is in its place."""
    found: Any = document
    for name in section.split("."):
        found = found.setdefault(name, {}) if isinstance(found, dict) else {}
    return found


def test_the_file_is_up_to_date(repository):
    for path in ("device_configs/skiffd.schema.json", "docs/reference/skiffd.schema.json"):
        text = (repository / path).read_text(encoding="utf-8")
        assert text == config_schema.text(), (
            "run: python -m edge_runtime.config.schema > device_configs/skiffd.schema.json"
        )


def test_it_is_the_draft_that_editors_know():
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert json.loads(config_schema.text()) == SCHEMA


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_device_config_satisfies_it_and_names_it(path):
    text = path.read_text(encoding="utf-8")
    assert is_valid(SCHEMA, tomllib.loads(text))
    word, _, target = text.splitlines()[0].partition(" ")
    assert word == "#:schema"
    assert (path.parent / target).resolve() == path.parent / "skiffd.schema.json"


def test_a_file_with_a_base_may_leave_everything_to_it():
    assert is_valid(SCHEMA, {"base": "x86-gateway.toml", "device": {"id": "d"}})
    assert not is_valid(SCHEMA, {"base": "x86-gateway.toml", "device": {"idd": "d"}})
    assert not is_valid(SCHEMA, {"base": 3})


KEYS = [(section, key) for section in config_keys.SECTIONS for key in section.keys]


@pytest.mark.parametrize(("section", "key"), KEYS, ids=lambda part: part.name)
def test_every_key_is_explained_and_has_a_default_that_is_allowed(section, key):
    assert key.why.endswith((".", "?"))
    assert bool(key.pattern) or key.check is None
    if key.default is not None:
        document = with_value(section.name, key.name, key.default)
        assert reads(document)
        assert is_valid(SCHEMA, document)
    if key.kind in {"integer", "number"}:
        for value, allowed in (
            (key.low, True),
            (key.high, True),
            (key.low - 1, False),
            (key.high * 1.5 + 1, False),
        ):
            document = with_value(section.name, key.name, int(value) if key.kind == "integer" else value)
            assert reads(document) is allowed, value
            assert is_valid(SCHEMA, document) is allowed, value


def test_missing_tables_and_keys_are_missed_by_both():
    for section in ("device", "broker", "model"):
        document = {name: table for name, table in MINIMAL.items() if name != section}
        assert not reads(document)
        assert not is_valid(SCHEMA, document)
    for section, key in (("device", "id"), ("device", "state_dir"), ("model", "trust_root")):
        document = copy.deepcopy(MINIMAL)
        del document[section][key]
        assert not reads(document)
        assert not is_valid(SCHEMA, document)


SCALARS = st.one_of(
    st.booleans(),
    st.integers(-(2**63), 2**63 - 1),
    st.integers(-2, 100),
    st.floats().filter(lambda x: not x.is_integer()),  # in JSON 5.0 is a whole number, in TOML it is none
    st.sampled_from(["", "a", "a\n", "auto", "replay", "unix", "mqtt", "3.1.1", "0600", "A/b", "x" * 1025]),
    st.text(st.characters(codec="utf-8"), max_size=5),
)
VALUES = st.one_of(
    SCALARS, st.lists(SCALARS, max_size=2), st.dictionaries(st.sampled_from(["a", "kind"]), SCALARS)
)


def key_values(key):
    fits = {
        "flag": st.booleans(),
        "flag_or_auto": st.sampled_from([True, False, "auto"]),
        "integer": st.integers(int(key.low), int(key.high)),
        "number": st.floats(key.low, key.high),
    }.get(
        key.kind, st.sampled_from([*key.choices, "a"]) if key.choices else st.sampled_from(["a", "", "0640"])
    )
    return st.one_of(fits, fits, fits, fits, fits, VALUES)


@st.composite
def documents(draw):
    document = copy.deepcopy(MINIMAL)
    if draw(st.integers(0, 9)) == 0:
        del document[draw(st.sampled_from(sorted(document)))]
    for section in draw(st.lists(st.sampled_from(config_keys.SECTIONS), max_size=4)):
        found = table(document, section.name)
        if not isinstance(found, dict):
            continue
        if section.free or draw(st.integers(0, 19)) == 0:
            found[draw(st.text(st.characters(codec="utf-8"), max_size=3))] = draw(st.text() | SCALARS)
        for key in draw(st.lists(st.sampled_from(section.keys), max_size=3)) if section.keys else []:
            found[key.name] = draw(key_values(key))
    if draw(st.integers(0, 19)) == 0:
        document[draw(st.sampled_from(["window", "odd", "budgets"]))] = draw(VALUES)
    return document


SEEN: list[bool] = []


@given(documents())
def test_the_reader_and_the_schema_agree_on_any_document(document):
    accepted = reads(document)
    SEEN.append(accepted)
    assert is_valid(SCHEMA, document) is accepted


def test_the_documents_above_were_of_both_sorts():
    if len(SEEN) < 100:
        test_the_reader_and_the_schema_agree_on_any_document()
    assert 0.1 < sum(SEEN) / len(SEEN) < 0.9


@pytest.mark.parametrize(
    ("section", "values", "accepted"),
    [
        ("broker.tls", {"certificate": "c"}, False),
        ("broker.tls", {"key": "k"}, False),
        ("broker.tls", {"key": "k", "certificate": ""}, False),
        ("broker.tls", {"key": "k", "certificate": "c"}, True),
        ("broker.tls", {"key": "", "certificate": ""}, True),
        ("source", {"kind": "replay"}, False),
        ("source", {"kind": "replay", "path": ""}, False),
        ("source", {"kind": "replay", "path": "p"}, True),
        ("source", {"kind": "unix"}, False),
        ("source", {"kind": "unix", "socket": "s"}, True),
        ("source", {"kind": "mqtt"}, False),
        ("source", {"kind": "mqtt", "topic_in": "t"}, True),
        ("source", {"kind": "stdio"}, True),
    ],
)
def test_what_belongs_together_is_known_to_both(section, values, accepted):
    document = copy.deepcopy(MINIMAL)
    table(document, section).update(values)
    assert reads(document) is accepted
    assert is_valid(SCHEMA, document) is accepted

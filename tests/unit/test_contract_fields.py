"""Refusals of `Fields` say where, what was found and what is allowed."""

import math

import pytest

from edge_runtime.contract.errors import ConfigError, ContractError
from edge_runtime.contract.fields import MAX_LIKENED, Fields, nearest


@pytest.fixture
def fields():
    return Fields(
        {
            "name": "left",
            "count": 3,
            "share": 0.5,
            "on": True,
            "raw": b"abc",
            "list": [1, 2],
            "words": ["a", "b"],
            "table": {"b": "2", "a": "1"},
            "tables": [{"x": 1}, {"x": 2}],
        },
        "doc",
    )


def test_what_is_right_is_read(fields):
    assert fields.path == "doc"
    assert fields.text("name", choices=("left", "right")) == "left"
    assert fields.integer("count", low=3, high=3) == 3
    assert fields.number("count") == 3.0
    assert fields.number("share") == 0.5
    assert fields.flag("on") is True
    assert fields.blob("raw") == b"abc"
    assert fields.integers("list") == (1, 2)
    assert fields.numbers("list") == (1.0, 2.0)
    assert fields.texts("words") == ("a", "b")
    assert fields.pairs("table") == (("a", "1"), ("b", "2"))
    assert [f.integer("x") for f in fields.sections("tables")] == [1, 2]
    fields.finish()


def test_defaults_stand_in_for_what_is_absent(fields):
    assert fields.text("other", "x") == "x"
    assert fields.integer("other", 1) == 1
    assert fields.number("other", 1.5) == 1.5
    assert fields.flag("other", False) is False
    assert fields.blob("other", b"") == b""
    assert fields.items("other", ()) == []
    assert fields.counts("other", {}) == ()


@pytest.mark.parametrize(
    ("read", "message"),
    [
        (lambda f: f.text("absent"), r"doc\.absent: is missing"),
        (lambda f: f.text("count"), r"doc\.count: expected text, got int 3"),
        (lambda f: f.text("name", max_length=2), r"doc\.name: is 4 characters long; at most 2"),
        (
            lambda f: f.text("name", choices=("lift", "right")),
            r"not one of lift, right \(did you mean 'lift'\?\)",
        ),
        (lambda f: f.integer("share"), r"doc\.share: expected a whole number, got float 0\.5"),
        (lambda f: f.integer("on"), r"doc\.on: expected a whole number, got bool True"),
        (lambda f: f.integer("count", low=4), r"doc\.count: 3 is outside \[4, "),
        (lambda f: f.number("name"), r"doc\.name: expected a number, got str of length 4"),
        (lambda f: f.number("count", high=2), r"doc\.count: 3\.0 is not a finite number in \[-inf, 2\]"),
        (lambda f: f.flag("count"), r"doc\.count: expected true or false"),
        (lambda f: f.blob("raw", max_length=2), r"doc\.raw: holds 3 bytes; at most 2"),
        (lambda f: f.items("table"), r"doc\.table: expected a list, got dict of length 2"),
        (lambda f: f.integers("words"), r"doc\.words\[0\]"),
        (lambda f: f.texts("list"), r"doc\.list\[0\]: expected text, got int 1"),
        (lambda f: f.section("list"), r"doc\.list: expected a table of named fields, got list"),
        (lambda f: f.section("table").integer("a"), r"doc\.table\.a: expected a whole number"),
        (lambda f: list(f.sections("list")), r"doc\.list\[0\]: expected a table"),
    ],
)
def test_what_is_wrong_is_named(fields, read, message):
    with pytest.raises(ContractError, match=message):
        read(fields)


def test_the_family_of_errors_is_the_callers():
    with pytest.raises(ConfigError, match=r"file\.a\.b: is missing"):
        Fields({"a": {}}, "file", ConfigError).section("a").text("b")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 10**400, -(10**400)])
def test_a_number_must_be_finite_whatever_its_size(value):
    with pytest.raises(ContractError, match="not a finite number"):
        Fields({"x": value}, "doc").number("x")
    with pytest.raises(ContractError, match=r"doc\.x\[0\]"):
        Fields({"x": [value]}, "doc").numbers("x")


def test_half_a_surrogate_pair_is_not_text():
    with pytest.raises(ContractError, match=r"doc\.x: holds half of a surrogate pair"):
        Fields({"x": "\ud800"}, "doc").text("x")
    with pytest.raises(ContractError, match="is not text"):
        Fields({"\ud800": "1"}, "doc").finish()


def test_an_unknown_key_is_answered_with_the_nearest(fields):
    fields.text("name")
    fields.integer("cuont", 0)
    with pytest.raises(
        ContractError, match=r"unknown key 'count' \(did you mean 'cuont'\?\); valid keys: cuont, name"
    ):
        fields.finish()


def test_a_key_must_be_text():
    with pytest.raises(ContractError, match="key 1 is not text"):
        Fields({1: 2}, "doc").finish()


def test_a_name_that_a_stranger_made_long_is_likened_to_none():
    near = "pressure_hydraulic"
    assert nearest(near[:-1], [near]) == f" (did you mean {near!r}?)"
    assert nearest(near + "c" * MAX_LIKENED, [near + "c" * MAX_LIKENED]) == ""

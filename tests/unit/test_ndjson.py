"""The line protocol: every line that is not blank has exactly one well-formed answer, whatever stands in it."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.adapters.sources.ndjson import (
    MAX_BATCH_ROWS,
    MAX_ID_CHARS,
    MAX_MESSAGE_CHARS,
    Answer,
    Lines,
    Refusal,
    Request,
    encode,
    parse,
    respond,
)
from edge_runtime.contract.errors import InputError
from edge_runtime.runtime import Runtime
from tests.support.tiny_models import classifier, regressor, several

DIGEST = "ab" * 32
ONE = Answer("low", np.array([0.25, 0.75], np.float32), DIGEST)


def strict(text):
    """JSON as the standard has it."""

    def refuse(token):
        raise AssertionError(f"{token} is no JSON")

    return json.loads(text, parse_constant=refuse)


def answered(line, answer=lambda _: ONE, limit=1000):
    reply = respond(line, answer, arrived_ns=5, max_line_bytes=limit)
    assert reply.endswith(b"\n")
    assert reply.count(b"\n") == 1
    assert reply.isascii()
    return strict(reply)


# ── requests ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("line", "request_"),
    [
        (b"[1, 2.5, null]", Request(rows=[1, 2.5, None], arrived_ns=7)),
        (b'\t{"a": 1, "b": "x"}\r', Request(rows={"a": 1, "b": "x"}, arrived_ns=7)),
        (b"{}", Request(rows={}, arrived_ns=7)),
        (b"\xef\xbb\xbf[1]", Request(rows=[1], arrived_ns=7)),  # the mark that .NET begins a stream with
        (b'{"row": [1], "id": 3}', Request(rows=[1], id=3, arrived_ns=7)),
        (b'{"row": {"a": 1}, "truth": "up"}', Request(rows={"a": 1}, truth="up", arrived_ns=7)),
        (b'{"row": [1], "truth": ["red", "s"]}', Request(rows=[1], truth=["red", "s"], arrived_ns=7)),
        (b'{"rows": [[1], {"a": 2}]}', Request(rows=[[1], {"a": 2}], batch=True, arrived_ns=7)),
        (b'{"rows": []}', Request(rows=[], batch=True, arrived_ns=7)),
        (
            b'{"rows": [[1], [2]], "truth": [null, 1], "id": "q"}',
            Request(rows=[[1], [2]], batch=True, truth=[None, 1], id="q", arrived_ns=7),
        ),
        # A model may have features of these names: a feature's value is no array and no object.
        (b'{"row": 1, "rows": 2, "id": 3}', Request(rows={"row": 1, "rows": 2, "id": 3}, arrived_ns=7)),
    ],
)
def test_what_a_line_asks(line, request_):
    assert parse(line, 7) == request_


@pytest.mark.parametrize("line", [b"", b" ", b"\r", b"\t \r", b"\xef\xbb\xbf"])
def test_blank_lines_ask_nothing(line):
    assert parse(line) is None
    assert respond(line, lambda _: ONE, arrived_ns=1, max_line_bytes=9) == b""


@pytest.mark.parametrize(
    ("line", "reason", "message"),
    [
        (b"nope", "json", "not JSON: Expecting value"),
        (b"[1, 2", "json", "not JSON"),
        (b"[1] [2]", "json", "Extra data"),
        (b"[1]\x00", "json", "Extra data"),
        (b"[\xff]", "json", "not UTF-8 at byte 1"),
        (b'{"a": 1, "b": 2, "a": 3}', "json", "the key 'a' stands twice"),
        (b'{"row": {"a": 1, "a": 3}}', "json", "the key 'a' stands twice"),
        (b"[" * 100_000, "json", "nested too deeply"),
        (b'{"a":' * 100_000, "json", "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "json", "not JSON: Exceeds the limit"),
        (b"3", "request", "a number is no row"),
        (b'"text"', "request", "text is no row"),
        (b"null", "request", "null is no row"),
        (b"true", "request", "true is no row"),
        (b"[]", "width", "the row has no values"),
        (b'{"row": []}', "width", "the row has no values"),
        (b"[[1, 2], [3, 4]]", "type", '(several rows go as {"rows": […]})'),
        (b'{"a": {"b": 1}}', "type", "value 'a' is an object"),
        (b'{"row": [1, [2]]}', "type", "value 1 is an array"),
        (b'{"rows": [[1], [[2]]]}', "type", "row 1: value 0 is an array"),
        (b'{"rows": [1, 2]}', "request", "row 0: a number is no row"),
        (b'{"rows": {"a": 1}}', "request", "rows is an object"),
        (b'{"rows": [[1]], "row": [1]}', "request", "row and rows"),
        (b'{"row": [1], "ids": 4}', "request", "no key 'ids'"),
        (b'{"row": [1], "id": [4]}', "request", "the id is an array"),
        (b'{"row": [1], "id": 1e999}', "request", "the id is inf"),
        (b'{"row": [1], "id": NaN}', "request", "the id is nan"),
        (b'{"row": [1], "id": "%s"}' % (b"x" * (MAX_ID_CHARS + 1)), "request", "the id has 257 characters"),
        (b'{"row": [1], "truth": {"a": 1}}', "request", "the truth is nested"),
        (b'{"rows": [[1]], "truth": 1}', "request", "the truth of 1 rows"),
        (b'{"rows": [[1]], "truth": [1, 2]}', "request", "the truth of 1 rows"),
        (b'{"rows": [%s[1]]}' % (b"[1]," * MAX_BATCH_ROWS), "too_long", "1025 rows in one line"),
    ],
)
def test_what_is_wrong_is_said(line, reason, message):
    found = parse(line)
    assert isinstance(found, Refusal)
    assert found.reason == reason
    assert message in found.message


def test_a_bad_envelope_is_answered_under_its_id():
    found = answered(b'{"id": "q7", "row": [1], "colour": 3}', lambda refused: refused)
    assert found["id"] == "q7"
    assert found["error"]["reason"] == "request"


def test_as_many_rows_as_are_allowed_go_in_one_line():
    found = parse(b'{"rows": [%s[1]]}' % (b"[1]," * (MAX_BATCH_ROWS - 1)))
    assert isinstance(found, Request)
    assert len(found.rows) == MAX_BATCH_ROWS


# ── answers ────────────────────────────────────────────────────────────────────────────────────────────


def test_an_answer_says_label_score_and_model():
    assert answered(b'{"row": [1], "id": 12}') == {
        "id": 12,
        "label": "low",
        "score": [0.25, 0.75],
        "model": DIGEST,
    }
    assert answered(b"[1]")["id"] is None


def test_a_batch_is_answered_with_arrays():
    scores = np.array([[0.5, 0.5], [1, 0]], np.float32)
    found = strict(encode(1, Answer(np.array(["a", "b"]), scores, DIGEST)))
    assert found == {"id": 1, "label": ["a", "b"], "score": [[0.5, 0.5], [1.0, 0.0]], "model": DIGEST}


def test_scores_that_json_cannot_say_are_null():
    scores = np.array([[np.nan, 1], [np.inf, -np.inf]], np.float32)
    assert strict(encode(None, Answer(None, scores, DIGEST)))["score"] == [[None, 1.0], [None, None]]
    assert strict(encode(None, Answer(None, scores[0], DIGEST)))["score"] == [None, 1.0]


def test_every_float32_survives():
    score = np.array([0.1, 1 / 3, 3.4e38, 1e-45], np.float32)
    found = strict(encode(None, Answer(None, score, DIGEST)))["score"]
    assert np.array_equal(np.array(found, np.float32), score)


@pytest.mark.parametrize("id_", ['"\\ud800"', '"é\\n"', "true", "-0.5", "9" * 4000, "null", '""'])
def test_ids_come_back_as_they_are(id_):
    found = answered(b'{"row": [1], "id": %s}' % id_.encode(), limit=5000)
    assert found["id"] == json.loads(id_)
    assert type(found["id"]) is type(json.loads(id_))


def test_long_messages_are_cut():
    refused = Refusal("unknown_feature", "x" * 100_000)
    assert len(strict(encode(None, refused))["error"]["message"]) == MAX_MESSAGE_CHARS


@given(
    st.binary(max_size=80)
    | st.text(alphabet='{}[]",:row s1.9eE-+nulNaIfity\\ud8', max_size=60).map(str.encode)
)
def test_any_bytes_have_one_well_formed_answer_or_are_blank(line):
    line = line.replace(b"\n", b"")
    asked = []

    def answer(request):
        asked.append(request)
        return request if isinstance(request, Refusal) else ONE

    if not line.decode("utf-8", "replace").removeprefix("\ufeff").strip():
        assert respond(line, answer, arrived_ns=1, max_line_bytes=1000) == b""
        assert not asked
    else:
        found = answered(line, answer)
        assert set(found) in ({"id", "error"}, {"id", "label", "score", "model"})
        assert len(asked) == 1


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["row", "rows", "id", "truth", "a", "b", "c"]) | st.text(max_size=3),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@pytest.fixture(scope="module", params=[classifier(missing=("a",)), regressor(), several()])
def runtime(request):
    return Runtime(request.param.artifact)


@given(document=JSON)
def test_any_json_is_answered_or_refused_by_a_real_model(runtime, document):
    def answer(request):
        if isinstance(request, Refusal):
            return request
        try:
            label, score, _, model = runtime.predict(request.rows)
        except InputError as e:
            return Refusal(e.reason, str(e))
        assert score.ndim == (2 if request.batch else 1)
        assert not request.batch or len(score) == len(request.rows)
        return Answer(label, score, model)

    answered(json.dumps(document).encode(), answer, limit=10_000)


@pytest.mark.parametrize("tiny", [classifier(), regressor(), several()])
def test_no_rows_have_no_answers(tiny):
    label, score, _, model = Runtime(tiny.artifact).predict(parse(b'{"rows": []}').rows)  # type: ignore[union-attr]
    found = strict(encode(None, Answer(label, score, model)))
    assert found["score"] == []
    assert not found["label"]


# ── lines ──────────────────────────────────────────────────────────────────────────────────────────────


@given(
    st.lists(st.sampled_from([b"a", b"bcd", b"\n", b"\r\n", b"xxxxxxxxxxxx"])), st.integers(1, 9), st.data()
)
def test_lines_do_not_depend_on_how_they_arrive(pieces, limit, data):
    whole = b"".join(pieces)
    lines = Lines(limit)
    found = []
    rest = whole
    while rest:
        n = data.draw(st.integers(1, len(rest)))
        found += list(lines.push(rest[:n]))
        rest = rest[n:]
    found += list(lines.end())
    expected = whole.split(b"\n")
    if not expected[-1]:
        expected.pop()
    assert found == [line if len(line) <= limit else None for line in expected]


def test_a_line_without_end_takes_no_memory():
    lines = Lines(1000)
    found = [line for _ in range(1000) for line in lines.push(bytes(1 << 16))]
    assert found == [None]
    assert len(lines._tail) == 0
    assert list(lines.push(b"\n[1]\n")) == [b"[1]"]


def test_a_line_as_long_as_allowed_is_one():
    lines = Lines(4)
    assert list(lines.push(b"abcd")) == []
    assert list(lines.push(b"\nabcde\nab")) == [b"abcd", None]
    assert list(lines.end()) == [b"ab"]


def test_a_line_too_long_says_how_long_it_may_be():
    refused = answered(None, lambda refused: refused)["error"]
    assert refused == {"reason": "too_long", "message": "the line is longer than 1000 bytes"}
    assert answered(b"[" + b" " * 1000, lambda refused: refused)["error"]["reason"] == "too_long"

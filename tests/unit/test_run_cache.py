"""Runs that are kept: what an interrupted benchmark finds again, and what it must not."""

import json

import pytest

from benchmarks import run_cache
from benchmarks.run_cache import Cache, digest_of, key_of, perform


def test_what_was_added_is_found_again_by_the_same_sources_only(tmp_path):
    path = tmp_path / "deep" / "runs.jsonl"
    Cache(path, "a").add("one", {"x": 1})
    Cache(path, "b").add("one", {"x": 2})
    first, second = Cache(path, "a"), Cache(path, "b")
    assert (first.get("one"), second.get("one")) == ({"x": 1}, {"x": 2})
    assert (len(first), first.others) == (1, 1)
    assert first.get("two") is None


def test_a_torn_last_line_is_cut_off_and_what_follows_is_whole(tmp_path):
    path = tmp_path / "runs.jsonl"
    Cache(path, "a").add("one", {"x": 1})
    with path.open("a") as file:
        file.write('{"key": "two", "sour')
    kept = Cache(path, "a")
    assert len(kept) == 1
    kept.add("two", {"x": 2})
    assert Cache(path, "a").get("two") == {"x": 2}
    path.write_text('{"key": "torn"')
    assert len(Cache(path, "a")) == 0
    assert path.read_text() == ""


@pytest.mark.parametrize("line", ["nonsense", "[]", '{"key": "one"}'])
def test_a_line_that_is_no_run_is_named(tmp_path, line):
    path = tmp_path / "runs.jsonl"
    Cache(path, "a").add("one", {"x": 1})
    with path.open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2: not a run"):
        Cache(path, "a")


def test_a_key_does_not_depend_on_order():
    assert key_of({"a": 1, "b": [2]}) == key_of({"b": [2], "a": 1}) != key_of({"a": 1, "b": [3]})


def modules(folder, monkeypatch, **sources):
    monkeypatch.setattr(run_cache, "TREE", folder)
    (folder / "pack").mkdir(exist_ok=True)
    for name, text in sources.items():
        (folder / "pack" / f"{name}.py").write_text(text)


def test_a_digest_follows_imports_and_ignores_what_changes_nothing(tmp_path, monkeypatch):
    one = "from pack import two\nimport json\n\ndef f():\n    return two.g()\n"
    two = "def g():\n    return 1\n"
    modules(tmp_path, monkeypatch, one=one, two=two)
    digest = digest_of(["pack.one"], ["settings"])
    same = '"""Docs."""\n\ndef g():\n    """Docs."""\n    return 1  # a remark\n'
    modules(tmp_path, monkeypatch, two=same)
    assert digest_of(["pack.one"], ["settings"]) == digest
    assert digest_of(["pack.one"], ["others"]) != digest
    modules(tmp_path, monkeypatch, two=two.replace("1", "2"))
    changed = digest_of(["pack.one"], ["settings"])
    assert changed != digest
    modules(tmp_path, monkeypatch, two=two.replace("1", "3"))
    assert digest_of(["pack.one"], ["settings"], without=["pack.two"]) == digest_of(
        ["pack.one"], ["settings"], without=["pack.two", "pack.three"]
    )
    assert digest_of(["pack.one"], ["settings"]) != changed


def square(number):
    if number < 0:
        raise ArithmeticError("below nothing")
    return {"square": number**2}


def test_only_what_is_missing_is_done_and_answers_come_in_the_order_asked(tmp_path):
    path = tmp_path / "runs.jsonl"
    Cache(path, "a").add("3", {"square": "kept"})
    todo = {str(number): number for number in (5, 3, 4)}
    found = perform(square, todo, Cache(path, "a"), workers=1)
    assert found == [{"square": 25}, {"square": "kept"}, {"square": 16}]
    assert {json.loads(line)["key"] for line in path.read_text().splitlines()} == {"3", "4", "5"}
    assert perform(square, todo, Cache(path, "b"), seconds=0) == []


def test_a_run_that_fails_ends_the_rest_and_finished_ones_are_kept(tmp_path):
    path = tmp_path / "runs.jsonl"
    with pytest.raises(ArithmeticError, match="below nothing"):
        perform(square, {"2": 2, "-1": -1}, Cache(path, "a"), workers=1)
    assert Cache(path, "a").get("2") == {"square": 4}


def test_it_says_how_far_it_is(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(run_cache, "_TOLD_EVERY_SECONDS", -1.0)
    perform(square, {"2": 2}, Cache(None, "a"), workers=1)
    told = capsys.readouterr().err
    assert "1 of 1 runs to do" in told
    assert "1 of 1 runs, " in told

"""Training specs: what is read, and how every mistake is named."""

from pathlib import Path

import pytest

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.manifest import Budgets
from trainer.datasets import load_watch
from trainer.spec import KINDS, DeclaredRanges, ModelSpec, TableSource, WatchSource, load

WATCH = """
name = "watch"
version = "1"
seed = 7

[data]
source = "watch"
people = [1, 2]
wrists = [0]

[evaluation]
people = [7, 8]

[model]
kind = "forest"
trees = 10
max_samples = 0.5

[budgets]
predict_p99_us = 200.0
rss_mb = 150.0

[conversion]
probes = 500
"""

TABLE = """
name = "pump"
version = "0.1"

[data]
source = "rows.csv"
target = "state"
group = "device"

[model]
kind = "logistic"
scaler = "robust"
"""


@pytest.fixture
def spec(tmp_path):
    def read(text):
        path = tmp_path / "spec.toml"
        path.write_text(text, encoding="utf-8")
        return load(path)

    return read


def test_a_watch_spec(spec):
    found = spec(WATCH)
    assert (found.name, found.version, found.seed, found.probes) == ("watch", "1", 7, 500)
    assert found.source == WatchSource(people=(1, 2), wrists=(0,), evaluation=(7, 8))
    assert found.model == ModelSpec(
        kind="forest", scaler="standard", parameters=(("max_samples", 0.5), ("trees", 10))
    )
    assert found.budgets == Budgets(predict_p99_ns=200_000, rss_bytes=150_000_000)


def test_a_table_spec_and_its_defaults(spec, tmp_path):
    found = spec(TABLE)
    assert found.source == TableSource(
        path=(tmp_path / "rows.csv").resolve(), target="state", group="device", groups=(), fraction=0.25
    )
    assert (found.seed, found.probes, found.budgets) == (0, 100_000, Budgets())
    held = spec(TABLE + '[evaluation]\ngroups = ["d-1"]\n').source
    assert (held.groups, held.fraction) == (("d-1",), 0.0)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('version = "1"', "", r"spec\.toml\.version: is missing"),
        ('name = "watch"', 'name = "My Watch"', "'My Watch' is not a model name"),
        ("trees = 10", "treees = 10", r"model: unknown key 'treees' \(did you mean 'trees'\?\)"),
        ("trees = 10", "trees = 10.5", r"model\.trees: expected a whole number"),
        ("trees = 10", "trees = 0", r"model\.trees: 0 is outside \[1, 10000\]"),
        ("max_samples = 0.5", "max_samples = 2.0", r"model\.max_samples: 2.0 is not a finite number"),
        ("max_samples = 0.5", "alpha = 0.5", r"model: unknown key 'alpha'"),
        ('kind = "forest"', 'kind = "forrest"', r"did you mean 'forest'\?"),
        ("wrists = [0]", "wrist = [0]", r"data: unknown key 'wrist' \(did you mean 'wrists'\?\)"),
        ("wrists = [0]", 'target = "x"', "data: unknown key 'target'"),
        ("people = [7, 8]", "people = [2, 8]", r"\[2\] cannot be both trained and evaluated on"),
        ("people = [7, 8]", "people = []", "nobody cannot be both"),
        ("people = [7, 8]", "groups = []", r"evaluation\.people: is missing"),
        ('source = "watch"', 'source = "rows.xlsx"', "neither 'watch' nor the path of a .csv or .npz file"),
        ("seed = 7", "seed = -7", r"seed: -7 is outside"),
        ("seed = 7", "seed = ", "not TOML"),
        ("probes = 500", "probes = 0", r"conversion\.probes"),
    ],
)
def test_a_mistake_names_file_and_key(spec, before, after, message):
    assert before in WATCH
    with pytest.raises(ConfigError, match=message) as caught:
        spec(WATCH.replace(before, after))
    assert "spec.toml" in str(caught.value)


@pytest.mark.parametrize(
    ("ranges", "read"),
    [
        ("", None),
        ("ranges = {}", None),
        ('ranges = "training"', "training"),
        ("ranges.a = { low = -40, high = 125.5 }", (("a", (-40.0, 125.5)),)),
        ("ranges.b = { low = 0 }\nranges.a = { high = 1 }", (("b", (0.0, None)), ("a", (None, 1.0)))),
        ("[conversion.ranges]\n'x.y' = { low = 2, high = 2 }", (("x.y", (2.0, 2.0)),)),
    ],
)
def test_ranges(spec, tmp_path, ranges, read):
    found = spec(WATCH + ranges).ranges
    if isinstance(read, tuple):
        read = DeclaredRanges(where=f"{tmp_path / 'spec.toml'}.conversion.ranges", features=read)
    assert found == read


@pytest.mark.parametrize(
    ("ranges", "message"),
    [
        ('"trainig"', r"ranges: expected \"training\", or a table of features"),
        ("[0, 1]", r"ranges: expected \"training\", or a table of features"),
        ("{ a = [0, 1] }", r"ranges\.a: expected a table of named fields, got list of length 2"),
        ('{ a = "0:1" }', r"ranges\.a: expected a table of named fields, got str"),
        ("{ a = {} }", r"ranges\.a\.low: is missing, and so is high"),
        ("{ a = { low = 2, high = 1.5 } }", r"ranges\.a\.low: 2\.0 is above high, 1\.5; swap them"),
        ('{ a = { low = "2" } }', r"ranges\.a\.low: expected a number, got str"),
        ("{ a = { low = true } }", r"ranges\.a\.low: expected a number, got bool"),
        ("{ a = { high = inf } }", r"ranges\.a\.high: inf is not a finite number"),
        ("{ a = { high = nan } }", r"ranges\.a\.high: nan is not a finite number"),
        ("{ a = { low = 0, hihg = 1 } }", r"ranges\.a: unknown key 'hihg' \(did you mean 'high'\?\)"),
    ],
)
def test_a_mistake_in_a_range_names_file_and_key(spec, ranges, message):
    with pytest.raises(ConfigError, match=r"spec\.toml\.conversion\." + message):
        spec(f"{WATCH}ranges = {ranges}")


def test_groups_to_hold_out_need_a_column(spec):
    text = TABLE.replace('group = "device"\n', "") + '[evaluation]\ngroups = ["a"]\n'
    with pytest.raises(ConfigError, match="does not say which column"):
        spec(text)


def test_a_missing_file_says_so(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        load(tmp_path / "absent.toml")


@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_of_every_kind_is_accepted(spec, kind):
    lines = [f"{name} = {int(p.low) if p.whole else float(p.high)}" for name, p in KINDS[kind].items()]
    model = f'[model]\nkind = "{kind}"\n' + "\n".join(lines)
    found = spec(TABLE[: TABLE.index("[model]")] + model)
    assert [name for name, _ in found.model.parameters] == sorted(KINDS[kind])


def test_the_example_in_the_documentation_is_valid(spec):
    documented = (
        Path(load.__code__.co_filename).read_text(encoding="utf-8").split("::\n", 1)[1].split('"""')[0]
    )
    text = "\n".join(line.removeprefix("    ") for line in documented.splitlines())
    found = spec(text)
    assert found.source == WatchSource(people=(1, 2, 3), wrists=(0,), evaluation=(7, 8, 9, 10))
    assert isinstance(found.ranges, DeclaredRanges)
    assert {name for name, _ in found.ranges.features} <= set(load_watch().feature_names)

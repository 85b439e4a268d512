"""The page for Prometheus, and that alert rules and dashboards ask only for what is on it."""

import json
import re
from collections.abc import Iterator
from urllib.request import urlopen

import promql_parser
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from aggregator.adapters import exposition
from aggregator.adapters.exposition import FIGURES, OF_FLEET, OF_PROCESS, Exposition
from aggregator.records import CAUSES, Accuracy, Batch, Outlook, SinkState, StoreFigures
from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.ids import ModelName
from tests.support.fleet import A

DASHBOARDS = ("executive", "on-call", "debug")
STORE = StoreFigures(
    windows=7,
    rows=700,
    unjudged=1,
    rejected=2,
    duplicates_rejected=3,
    overlaps_rejected=4,
    events=5,
    dead_letters=6,
    dead_letters_ever=8,
)
SINKS = (SinkState("mqtt", 0, failing=False), SinkState("webhook", 3, failing=True))
OUTLOOK = Outlook(
    known=10,
    online=9,
    silent=1,
    store=STORE,
    verdicts=(("skew", "stable", 2),),
    incidents=(("drift", "page", 1), ("sensor", "ticket", 3)),
    retrains=(("waiting", 1),),
    rollouts=(("halted", 1),),
    latency=(("watch", 0.5, 2000.0), ("watch", 0.99, 5000.0)),
    accuracies=(
        Accuracy(
            model=ModelName("watch"),
            digest=A,
            cohort="fleet",
            devices=9,
            labelled=500,
            correct=400,
            known=0.8,
            half=0.03,
            compared=8,
            estimated=0.9,
            estimated_half=0.01,
            error=0.1,
            error_half=0.02,
        ),
    ),
)
BATCH = Batch(
    messages=30,
    windows=20,
    duplicates=2,
    overlaps=1,
    events=3,
    statuses=4,
    dead=(("payload", 2), ("overlap", 1)),
    acks=5,
    unsaid=1,
    shed=9,
    seconds=0.02,
    commit_seconds=0.004,
)


@pytest.fixture
def page() -> Iterator[Exposition]:
    with Exposition("1.2.3") as made:
        yield made


def scraped(page):
    """Samples by (name, labels) of the page as a scraper gets it."""
    with urlopen(f"http://127.0.0.1:{page.serve('127.0.0.1', 0)}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    page.close()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def sample_names():
    """The names of samples that `FIGURES` lead to."""
    for figure in FIGURES:
        if figure.kind == "histogram":
            yield from (figure.name + suffix for suffix in ("_bucket", "_sum", "_count"))
        else:
            yield figure.name


def test_a_scraper_gets_what_was_counted(page):
    page.batch(BATCH, 1_700_000_000.0)
    page.batch(Batch(messages=1, seconds=0.3), 1_700_000_009.0)
    page.link("aggregator", connected=True)
    page.fleet(OUTLOOK)
    found = scraped(page)
    of = {name: value for (name, labels), value in found.items() if not labels}
    assert found["skiff_build_info", (("version", "1.2.3"),)] == 1
    assert of["skiff_ingest_messages_total"] == 31
    assert of["skiff_ingest_windows_total"] == 20
    assert of["skiff_ingest_duplicates_total"] == 2
    assert of["skiff_ingest_overlaps_total"] == 1
    assert of["skiff_ingest_events_total"] == 3
    assert of["skiff_ingest_statuses_total"] == 4
    assert of["skiff_ingest_acks_total"] == 5
    assert of["skiff_ingest_unsaid_acks_total"] == 1
    assert of["skiff_ingest_shed_total"] == 9
    assert of["skiff_ingest_newest_window_timestamp_seconds"] == 1_700_000_000
    assert of["skiff_ingest_batch_seconds_count"] == 2
    assert of["skiff_ingest_batch_seconds_sum"] == pytest.approx(0.32)
    assert of["skiff_store_commit_seconds_count"] == 1
    assert found["skiff_store_commit_seconds_bucket", (("le", "0.0025"),)] == 0
    assert found["skiff_store_commit_seconds_bucket", (("le", "0.005"),)] == 1
    dead = {dict(labels)["cause"]: n for (name, labels), n in found.items() if "ingest_dead" in name}
    assert dead == {**dict.fromkeys(CAUSES, 0), "payload": 2, "overlap": 1}
    assert found["skiff_link_connected", (("identity", "aggregator"),)] == 1
    assert found["skiff_link_connected", (("identity", "coordinator"),)] == 0
    assert of["skiff_leader"] == 1
    assert (of["skiff_fleet_devices_known"], of["skiff_fleet_devices_online"]) == (10, 9)
    assert of["skiff_store_rows_total"] == 700
    assert found["skiff_drift_incidents_open", (("kind", "sensor"), ("severity", "ticket"))] == 3
    assert found["skiff_rollouts", (("state", "halted"),)] == 1
    assert found["skiff_model_latency_seconds", (("model", "watch"), ("quantile", "0.99"))] == 5e-6
    assert found["skiff_model_accuracy", (("model", "watch"),)] == 0.8
    assert found["skiff_model_estimate_error", (("model", "watch"),)] == 0.1


def test_the_page_shows_who_is_not_told_and_which_store_fails(page):
    page.sinks(SINKS)
    page.alarm("webhook", "failed")
    page.store_error("intake")
    found = scraped(page)
    assert found["skiff_alarm_waiting", (("sink", "webhook"),)] == 3
    assert found["skiff_alarm_sink_failing", (("sink", "webhook"),)] == 1
    assert found["skiff_alarm_sink_failing", (("sink", "mqtt"),)] == 0
    assert found["skiff_alarm_deliveries_total", (("end", "failed"), ("sink", "webhook"))] == 1
    assert found["skiff_store_errors_total", (("part", "intake"),)] == 1
    assert found["skiff_store_failing", (("part", "intake"),)] == 1
    page.store("intake", failing=False)
    assert scraped(page)["skiff_store_failing", (("part", "intake"),)] == 0


def test_the_page_has_every_figure_and_no_other(page):
    page.fleet(OUTLOOK)
    page.sinks(SINKS)
    assert {name for name, _ in scraped(page)} == set(sample_names())


def test_who_does_not_lead_shows_no_fleet(page):
    page.fleet(OUTLOOK)
    page.fleet(None)
    page.sinks(SINKS)
    found = {name for name, _ in scraped(page)}
    assert not found & {figure.name for figure in OF_FLEET}
    assert {figure.name for figure in OF_PROCESS if figure.kind != "histogram"} < found


def test_names_follow_prometheus_rules():
    for figure in FIGURES:
        assert re.fullmatch(r"skiff(_[a-z]+)+", figure.name)
        assert figure.name.endswith("_total") == (figure.kind == "counter")
        assert figure.name.endswith("_info") == (figure.kind == "info")
        if figure.kind == "histogram":
            assert figure.name.endswith("_seconds")
        assert not re.search(r"_(ms|milliseconds|minutes|kb|mb|percent)(_|$)", figure.name)
        assert figure.help.endswith(".")
        assert not {"device", "session", "digest", "instance", "job"} & set(figure.labels)
    assert len({figure.name for figure in FIGURES}) == len(FIGURES)


def test_a_port_that_is_taken_is_named(page):
    port = page.serve("127.0.0.1", 0)
    with Exposition("1") as other, pytest.raises(ConfigError, match=rf"cannot listen on 127.0.0.1:{port}"):
        other.serve("127.0.0.1", port)


def test_the_reference_is_up_to_date(repository):
    written = (repository / "docs/reference/metrics.md").read_text(encoding="utf-8")
    assert written == exposition.reference(), (
        "run python -m aggregator.adapters.exposition > docs/reference/metrics.md"
    )


# ── rules and dashboards ───────────────────────────────────────────────────────────────────────────────


def selectors(expression):
    """Metric names, and the labels they are chosen by, of a PromQL expression; fails where it does not parse."""

    def walk(node):
        if isinstance(node, promql_parser.VectorSelector):
            yield node.name, {matcher.name for matcher in node.matchers.matchers}
        for name in ("expr", "lhs", "rhs", "vector_selector", "param"):
            child = getattr(node, name, None)
            if child is not None:
                yield from walk(child)
        for child in getattr(node, "args", None) or ():
            yield from walk(child)

    return list(walk(promql_parser.parse(expression)))


def check(expression):
    labels = {figure.name: set(figure.labels) for figure in FIGURES if figure.kind != "histogram"}
    for figure in FIGURES:
        if figure.kind == "histogram":
            suffixes = {"_bucket": {"le"}, "_sum": set(), "_count": set()}
            labels |= {figure.name + suffix: more for suffix, more in suffixes.items()}
    found = selectors(expression)
    assert found, expression
    for name, chosen in found:
        assert name in labels, f"{expression}: no metric {name!r} is exposed"
        assert chosen <= labels[name] | {"instance", "job"}, f"{expression}: {name} has no label of {chosen}"
    return {name for name, _ in found}


def rules(repository):
    groups = yaml.safe_load((repository / "monitoring/alerts.yml").read_text(encoding="utf-8"))["groups"]
    return [rule for group in groups for rule in group["rules"]]


def dashboard(repository, name):
    return json.loads((repository / f"monitoring/grafana/{name}.json").read_text(encoding="utf-8"))


def panels(board):
    return [panel for panel in board["panels"] if panel["type"] != "row"]


def test_the_check_finds_what_it_is_for():
    assert check('sum by (kind) (skiff_rollouts{state="halted"}) or vector(0)') == {"skiff_rollouts"}
    assert check("rate(skiff_ingest_batch_seconds_sum[1m]) / time()") == {"skiff_ingest_batch_seconds_sum"}
    for wrong in ("skiff_nothing > 1", 'skiff_rollouts{model="a"}', "rate(skiff_ingest_batch_seconds[1m])"):
        with pytest.raises(AssertionError):
            check(wrong)
    with pytest.raises(ValueError, match="unclosed"):
        check("sum(skiff_rollouts")


def test_alert_rules_are_complete_and_ask_for_what_is_exposed(repository):
    found = rules(repository)
    assert len({rule["alert"] for rule in found}) == len(found)
    for rule in found:
        assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in ("page", "ticket")
        assert {"summary", "description"} == set(rule["annotations"])
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))
        check(rule["expr"])
    asked = " ".join(rule["expr"] for rule in found)
    for needed in ("absent(", "newest_window", "dead_letters_total", 'severity="page"', 'state="halted"'):
        assert needed in asked


@pytest.mark.parametrize("name", DASHBOARDS)
def test_dashboards_load_and_ask_for_what_is_exposed(repository, name):
    board = dashboard(repository, name)
    assert board["uid"] == f"skiff-{name}"
    assert board["title"]
    assert board["schemaVersion"] >= 36
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    places: set[tuple[int, int]] = set()
    for panel in panels(board):
        assert panel["title"]
        assert panel["targets"]
        place = panel["gridPos"]
        assert place["x"] + place["w"] <= 24
        cells = {
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        }
        assert not cells & places, f"{panel['title']} lies on another panel"
        places |= cells
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            check(target["expr"])


def test_the_debug_dashboard_shows_every_figure_that_no_other_does(repository):
    shown = set()
    for name in DASHBOARDS:
        for panel in panels(dashboard(repository, name)):
            shown |= {n for target in panel["targets"] for n in check(target["expr"])}
    shown |= {n for rule in rules(repository) for n in check(rule["expr"])}
    unused = [f.name for f in FIGURES if not any(n.startswith(f.name) for n in shown)]
    assert not unused

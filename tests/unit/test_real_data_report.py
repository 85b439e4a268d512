"""What the cases on real data are judged by, and their table in the documentation."""

import pandas as pd
import pytest

from benchmarks.real_data import report
from benchmarks.real_data.cases import CASES, MODELS, Case


def case(kind, changed=None):
    return Case(
        name="one",
        what="rows",
        kind=kind,
        model="shift",
        rows=pd.DataFrame,
        device="d",
        time="t",
        window="1h",
        changed=changed,
    )


def found(*, alarms=(), requests=(), refused=0, accuracy=(0.9, 0.9, 0.5, 0.5)):
    return {
        "windows": [
            {
                "devices": 3,
                "rows": 10,
                "accuracy": value,
                "estimated_accuracy": 0.8,
                "refused": {"range": refused} if refused and k == 2 else {},
            }
            for k, value in enumerate(accuracy)
        ],
        "alarms": [{"opened_window": at, "severity": "page", "kind": "drift"} for at in alarms],
        "retrain_requests": [{"window": at} for at in requests],
    }


@pytest.mark.parametrize(
    ("kind", "said", "expected"),
    [
        ("nothing", {}, True),
        ("nothing", {"alarms": [3]}, False),
        ("harmless", {"alarms": [2]}, True),
        ("harmless", {"alarms": [2], "requests": [3]}, False),
        ("harmful", {"alarms": [2], "requests": [3]}, True),
        ("harmful", {"alarms": [2]}, False),
        ("harmful", {"alarms": [1], "requests": [3]}, False),
        ("harmful", {"alarms": [2], "requests": [1]}, False),
        ("fault", {"alarms": [2]}, True),
        ("fault", {"refused": 4}, True),
        ("fault", {}, False),
        ("fault", {"alarms": [2], "requests": [3]}, False),
    ],
)
def test_what_is_right(kind, said, expected):
    changed = None if kind == "nothing" else 2
    assert report.right(case(kind, changed), found(**said)) is expected


def test_a_row_of_the_table():
    row = report.row(case("harmful", 2), found(alarms=[2, 3], requests=[3], refused=4))
    assert (row["accuracy before"], row["accuracy after"], row["refused"]) == (0.9, 0.5, 4)
    line = report.markdown([row]).splitlines()[-1]
    said = "2 × page drift, 4 rows refused; first in window 2"
    assert (
        line == f"| `one` | rows | harmful, from window 2 | 4, 3 | 0.900 → 0.500 | {said} | window 3 | yes |"
    )
    unlabelled = report.row(case("harmful", 2), found(accuracy=(None,) * 4))
    assert "| estimated 0.800 → 0.800 | none | none | **no** |" in report.markdown([unlabelled])


def test_the_table_goes_between_its_marks(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"head\n{report.BEGIN}\nold\n{report.END}\ntail\n", encoding="utf-8")
    report.write([report.row(case("nothing"), found())], page)
    text = page.read_text(encoding="utf-8")
    assert text.startswith(f"head\n{report.BEGIN}\n\n| ")
    assert text.endswith(f"\n\n{report.END}\ntail\n")
    assert "\nold\n" not in text
    page.write_text("nothing\n", encoding="utf-8")
    with pytest.raises(ValueError, match="marks"):
        report.write([], page)


def test_every_case_has_its_own_name_and_a_model():
    assert len({one.name for one in CASES}) == len(CASES)
    assert {one.model for one in CASES} == set(MODELS)

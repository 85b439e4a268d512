"""The demonstration's figures and report: read from what the running parts stored or reported, nothing else."""

import statistics
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich import box
from rich.table import Table

from aggregator.records import Selection
from cli.demo.devices import MODEL
from cli.demo.story import MOST_INCIDENTS, MOVED, UNSEEN, Story, evidence_of
from cli.models import read_artifact
from cli.report import AccuracyPoint, FeatureShift, Moment, Report, ServingPoint
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.manifest import Reference
from edge_runtime.contract.messages import Window
from edge_runtime.contract.profile import CellSpec, Profile, column_counts

SLICE_SECONDS = 4.0
SHOWN_SHIFTS = 3
ACCURACIES = (("left v1", "wrist0_v1"), ("right v1", "wrist1_v1"), ("right v2", "wrist1_v2"))


def summarise(story: Story) -> dict[str, Any]:
    """The summary for a machine; a figure that was never stored is None."""
    view = story.view
    figures = view.figures()
    everything = view.totals(Selection(model=MODEL))
    latency = view.latency(Selection(model=MODEL))
    certificates = [read_artifact(path)[1].certificate for path in sorted(story.work.glob("watch-*.onnx"))]
    newest = {t.device: t.rss_bytes for t in sorted(everything, key=lambda t: t.last_ns)}
    names = {digest: version for version, digest in story.versions.items()}
    rollouts = view.table("rollouts")[::-1]
    return {
        "devices": len(view.devices()),
        "windows_stored": figures.windows,
        "windows_duplicate_rejected": figures.duplicates_rejected,
        "rows": figures.rows,
        "failed_predictions": sum(t.failed for t in everything),
        "dead_letters": figures.dead_letters_ever,
        "wire_bytes_per_window_p50": view.wire_bytes_p50(),
        "parity": {
            "rows": sum(_int(c["rows"]) for c in certificates),
            "mismatches": sum(
                _int(c["label_mismatches"]) + _int(c["score_mismatches"]) for c in certificates
            ),
            "max_abs_error": max(float(str(c["max_abs_error"])) for c in certificates),
        },
        "predict_p50_us": round(latency.quantile_ns(0.5) / 1e3, 1),
        "predict_p99_us": round(latency.quantile_ns(0.99) / 1e3, 1),
        "rss_mb_p50": round(statistics.median(newest.values()) / 1e6, 1),
        "accuracy": {
            "wrist0_v1": _share(story, "left", "1"),
            "wrist1_v1": _share(story, "right", "1"),
            "wrist1_v2": _share(story, "right", "2"),
        },
        "alarms": [
            {
                "kind": row["kind"],
                "feature": row["document"].get("feature", ""),
                "cohort": row["cohort"],
                "severity": row["severity"],
                "model": names.get(row["digest"], row["digest"]),
                "look": row["document"]["opened_window"],
                "closed": row["closed_why"],
            }
            for row in view.table("incidents", MOST_INCIDENTS)[::-1]
        ],
        "rollouts": [
            {
                "model": names.get(row["document"]["candidate"], row["document"]["candidate"]),
                "digest": row["document"]["candidate"],
                "outcome": row["state"],
                "devices": sum(
                    1 for d in view.devices() for r in d.models if _ran(r, row["document"]["candidate"])
                ),
                "note": row["document"].get("note", ""),
            }
            for row in rollouts
        ],
        "serving": view.serving(MODEL),
        "restarts": story.processes.restarts(),
    }


def _int(value: object) -> int:
    assert isinstance(value, int)
    return value


def _ran(report: Any, digest: str) -> bool:
    """Whether the device commits ``digest`` now, keeps it as the one before, or says how trying it ended."""
    return digest in (report.serving, report.previous, report.outcome_digest)


def _share(story: Story, wrist: str, version: str) -> float | None:
    if version not in story.versions:
        return None
    labelled, correct = story.accuracy(wrist, version)
    return round(correct / labelled, 4) if labelled else None


def summary_table(summary: dict[str, Any], story: Story) -> Table:
    """The summary for a person."""
    table = Table(box=box.SIMPLE_HEAVY, show_header=False, pad_edge=False)
    for name, value in summary_rows(summary, story):
        table.add_row(name, value)
    return table


def summary_rows(summary: dict[str, Any], story: Story) -> list[tuple[str, str]]:
    """Name and value of each line of the summary."""
    accuracy, parity = summary["accuracy"], summary["parity"]
    versions = {digest: version for version, digest in story.versions.items()}
    serving = ", ".join(f"version {versions.get(d, d[:8])} on {n}" for d, n in summary["serving"].items())
    return [
        ("devices", f"{summary['devices']} (real skiffd processes; {story.broker_name})"),
        ("serving", serving),
        ("windows stored", f"{summary['windows_stored']:,}; {summary['rows']:,} rows"),
        ("repeats turned away", str(summary["windows_duplicate_rejected"])),
        ("bytes on the wire per window", f"{summary['wire_bytes_per_window_p50']} (median)"),
        (
            "parity",
            f"{parity['rows']:,} rows, {parity['mismatches']} mismatches, worst error {parity['max_abs_error']:.1e}",
        ),
        (
            "predict",
            f"p50 {summary['predict_p50_us']} us, p99 {summary['predict_p99_us']} us (wall, all devices)",
        ),
        ("failed predictions", str(summary["failed_predictions"])),
        ("RSS per device", f"{summary['rss_mb_p50']} MB (median)"),
        (
            "accuracy, people 7-10",
            ", ".join(f"{name} {_text(accuracy[key])}" for name, key in ACCURACIES),
        ),
        *(
            (f"rollout of version {r['model']}", f"{r['outcome']} {r['note']}".strip())
            for r in summary["rollouts"]
        ),
    ]


def _text(share: float | None) -> str:
    return "not seen" if share is None else f"{share:.3f}"


# ── the report ─────────────────────────────────────────────────────────────────────────────────────────


def build_report(story: Story, summary: dict[str, Any]) -> Report:
    """Everything the page shows."""
    view = story.view
    windows = view.windows(Selection(model=MODEL))
    wrists = {d.device: d.attribute("wrist") for d in view.devices()}
    unseen = set(view.named({"person": UNSEEN}))
    names = {digest: f"version {version}" for version, digest in story.versions.items()}
    start = story.moments.start_ns
    slices = _slices(windows, start)
    return Report(
        title="skiff: the whole loop, once",
        lead=(
            "A forest trained on left-wrist recordings served twenty watches. The right wrists joined, the aggregator "
            "said which features had moved, a better model was trained, proven, published and rolled out, and a bad "
            "one was turned down by its canaries. Raw rows never left a device."
        ),
        shifts=_shifts(story, windows),
        cohort=MOVED,
        accuracy=[
            AccuracyPoint(
                seconds=at,
                arm=f"{wrist} wrist",
                labelled=sum(w.labelled for w in found if w.device in unseen and wrists[w.device] == wrist),
                correct=sum(w.correct for w in found if w.device in unseen and wrists[w.device] == wrist),
            )
            for at, found in slices
            for wrist in ("left", "right")
        ],
        serving=[ServingPoint(seconds=at, devices=_devices_by_version(found, names)) for at, found in slices],
        moments=[Moment(seconds=(at - start) / 1e9, text=text) for at, text in story.moments.items],
        tables=[
            ("Summary", [("what", "value"), *summary_rows(summary, story)]),
            ("Incidents", _incident_rows(story)),
            ("Rollouts and requests", _audit_rows(story)),
            ("Devices", _device_rows(story, names)),
        ],
    )


def _slices(windows: Any, start_ns: int) -> list[tuple[float, list[Window]]]:
    found: dict[int, list[Window]] = {}
    for window in windows:
        found.setdefault(int((window.end_ns - start_ns) / 1e9 // SLICE_SECONDS), []).append(window)
    return [((k + 0.5) * SLICE_SECONDS, found[k]) for k in sorted(found)]


def _devices_by_version(windows: list[Window], names: dict[Any, str]) -> dict[str, int]:
    last = {w.device: names.get(w.digest, w.digest[:8]) for w in windows}
    return {version: list(last.values()).count(version) for version in set(last.values())}


def _shifts(story: Story, windows: Any) -> list[FeatureShift]:
    if not story.alarms:
        return []
    alarm = story.alarms[0]["document"]
    info = read_artifact(story.work / "watch-1.onnx")[1]
    devices: dict[DeviceId, Profile] = {}
    for window in windows:
        if window.digest == story.alarms[0]["digest"] and window.device in alarm["devices"]:
            known = devices.get(window.device)
            devices[window.device] = window.profile if known is None else known.merge(window.profile)
    shown = story.alarms[:SHOWN_SHIFTS]
    return [_shift(info.reference, list(devices.values()), incident) for incident in shown]


def _shift(reference: Reference, devices: list[Profile], incident: dict[str, Any]) -> FeatureShift:
    spec, name, evidence = reference.spec, incident["document"]["feature"], evidence_of(incident)
    j = [column.name for column in spec.columns].index(name)
    return FeatureShift(
        name=name,
        edges=np.asarray(spec.columns[j].edges, np.float64),
        reference=_cumulative(spec, [p for _, p in reference.groups], j),
        fleet=_cumulative(spec, devices, j),
        score=float(evidence["z"]),
        psi=float(evidence["psi"]),
    )


def _cumulative(spec: CellSpec, profiles: list[Profile], j: int) -> NDArray[np.float64]:
    counts = np.stack([column_counts(spec, profile, j) for profile in profiles]).astype(np.float64)
    shares: NDArray[np.float64] = np.cumsum(counts, axis=1)[:, :-1] / counts.sum(axis=1, keepdims=True)
    return shares


def _incident_rows(story: Story) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("number", "open", "kind", "where", "severity", "why", "closed because")]
    start = story.moments.start_ns
    for row in story.view.table("incidents", MOST_INCIDENTS)[::-1]:
        until = f"{(row['closed_ns'] - start) / 1e9:.0f} s" if row["closed_ns"] else "now"
        where = ", ".join(filter(None, (row["document"].get("feature"), row["cohort"])))
        rows.append(
            (
                str(row["id"]),
                f"{(row['opened_ns'] - start) / 1e9:.0f} s to {until}",
                *(row["kind"], where, row["severity"], row["document"]["why"], row["closed_why"]),
            )
        )
    return rows


def _audit_rows(story: Story) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("after", "who", "what", "why", "rollout")]
    for row in story.view.table("audit", MOST_INCIDENTS)[::-1]:
        if " incident " in row["what"]:
            continue  # they have a table of their own
        after = (row["at_ns"] - story.moments.start_ns) / 1e9
        rows.append((f"{after:.0f} s", row["who"], row["what"], row["why"], row["rollout"]))
    return rows


def _device_rows(story: Story, names: dict[Any, str]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("device", "serves", "p50 / p99 of predict", "RSS", "last outcome")]
    rss = {
        t.device: t.rss_bytes
        for t in sorted(story.view.totals(Selection(model=MODEL)), key=lambda t: t.last_ns)
    }
    for device in story.view.devices():
        report = device.report(MODEL)
        latency = story.view.latency(Selection(devices=(device.device,)))
        serving = report.serving if report is not None else None
        rows.append(
            (
                device.device,
                names.get(serving, "nothing"),
                f"{latency.quantile_ns(0.5) / 1e3:.0f} / {latency.quantile_ns(0.99) / 1e3:.0f} us",
                f"{rss.get(device.device, 0) / 1e6:.0f} MB",
                f"{report.outcome} {report.reason}".strip() if report is not None else "",
            )
        )
    return rows

"""The outcome as one self-contained page: what moved when, before and after, and the accuracy."""

import html
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, MaxNLocator
from numpy.typing import NDArray

from aggregator.looks import Alarm, Slice
from cli.backtest.outcome import Outcome, accuracy, moment, rows_of, span
from cli.page import FLEET, GOOD, INK, MUTED, REFERENCE, page, plotting, section, svg, table
from edge_runtime.contract.ids import DeviceId
from edge_runtime.contract.profile import column_counts, merge_all

MOST_FEATURES = 40
MOST_HISTOGRAMS = 9
STRONG = 0.3
"""A KS figure from which on the colour says no more."""

_SHADES = LinearSegmentedColormap.from_list("shift", ["#f4f6f9", "#f3c9a8", FLEET, "#8c2f0d"])


def render(outcome: Outcome, notes: Sequence[str], data: str) -> str:
    """The page as HTML text; ``data`` is what was replayed."""
    manifest, slices = outcome.info.manifest, outcome.slices
    devices = {reading.device for found in slices for reading in found.readings}
    past = f"the devices' own history of {len(outcome.history)} windows" if outcome.history else ""
    baseline = past or "the training profile in the artifact, then the devices' own first windows"
    if outcome.learned:
        baseline += f" (0 to {outcome.learned - 1}, against which those from {outcome.learned} on are judged)"
    lead = (
        f"{data}: {sum(map(rows_of, slices)):,} rows of {len(devices)} devices in {len(slices)} windows, from "
        f"{moment(slices[0].start_ns)} to {moment(slices[-1].end_ns)}, against {baseline}. "
        f"{_number(len(outcome.alarms), 'alarm')}, {_number(len(outcome.wishes), 'retrain request')}."
    )
    alarms = [("severity", "kind", "feature", "windows", "devices", "why")]
    alarms += [
        (a.severity, a.kind, a.feature or "", _span(a), _few(a.devices), a.why)
        for a in sorted(outcome.alarms, key=lambda a: a.opened_window)
    ]
    sections = [section("Alarms", "" if outcome.alarms else "None.", table(alarms) if outcome.alarms else "")]
    if outcome.wishes:
        rows = [("window", "why"), *((str(wish.window), wish.why) for wish in outcome.wishes)]
        sections.append(section("Retrain requests", "", table(rows)))
    with plotting():
        sections.append(section("What moved when", _HEATMAP, svg(_heatmap(outcome))))
        moved = _moved(outcome)
        if moved:
            whose = past or "the training data"
            said = f"Share of values in each of the model's cells: {whose}, and the devices that the alarm names."
            sections.append(section("Before and after", said, svg(_histograms(outcome, moved))))
        curves = _curves(outcome)
        if curves:
            sections.append(section("Accuracy", _ACCURACY, svg(_accuracy(outcome, curves))))
    if notes:
        items = "".join(f"<li>{html.escape(text)}</li>" for text in notes)
        sections.append(section("Notes", "", f"<ul>{items}</ul>"))
    return page(f"Backtest of {manifest.name} {manifest.version}", lead, sections)


_HEATMAP = (
    "The largest difference of the distribution functions (KS) of each feature in each window. Frames: an alarm of the "
    "feature stood. Size alone is no alarm: the judge asks whether devices differ by more than they do from day to day."
)


_ACCURACY = (
    "Known: the share of labelled rows that the model predicted right. Estimated: from its own probabilities, the mean "
    "of the devices with its 95 % interval. Shaded: an alarm on predictions or performance stood."
)


def _number(n: int, what: str) -> str:
    return f"{n or 'no'} {what}{'' if n == 1 else 's'}"


def _few(devices: Sequence[DeviceId]) -> str:
    """At most three lines of a narrow column."""
    return (
        ", ".join(devices) if len(devices) <= 3 else f"{', '.join(devices[:2])} and {len(devices) - 2} more"
    )


def _span(alarm: Alarm) -> str:
    """In one line of a narrow column."""
    return span(alarm).replace(" ", "\N{NO-BREAK SPACE}")


def _covered(outcome: Outcome, alarm: Alarm) -> tuple[int, int]:
    """The first window in which the alarm stood, and the one after the last."""
    return alarm.opened_window, (
        len(outcome.slices)
        if alarm.closed_window is None
        else max(alarm.closed_window, alarm.opened_window + 1)
    )


def _heatmap(outcome: Outcome) -> Figure:
    alarmed = {alarm.feature for alarm in outcome.alarms}
    ks = {
        feature.name: np.array(
            [figures[feature.name].ks if figures else np.nan for figures in outcome.figures]
        )
        for feature in outcome.info.manifest.features
    }
    names = sorted(ks, key=lambda name: (name not in alarmed, -float(np.nanmax(ks[name], initial=0.0))))[
        :MOST_FEATURES
    ]
    figure = Figure(figsize=(9.4, 0.9 + 0.21 * max(len(names), 4)), layout="constrained")
    ax = figure.subplots()
    image = ax.imshow(
        np.stack([ks[name] for name in names]),
        aspect="auto",
        cmap=_SHADES,
        vmin=0.0,
        vmax=STRONG,
        interpolation="nearest",
    )
    for alarm in outcome.alarms:
        if alarm.feature in names:
            start, stop = _covered(outcome, alarm)
            at = (start - 0.5, names.index(alarm.feature) - 0.5)
            ax.add_patch(
                Rectangle(at, stop - start, 1.0, fill=False, edgecolor=INK, linewidth=1.3, clip_on=False)
            )
    ax.set_yticks(range(len(names)), names, fontsize=8)
    for label, name in zip(ax.get_yticklabels(), names, strict=True):
        label.set_color(INK if name in alarmed else MUTED)
        label.set_fontweight("bold" if name in alarmed else "normal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    _windows_axis(ax, outcome.slices)
    if len(names) < len(ks):
        ax.set_title(f"{len(names)} of {len(ks)} features", loc="left", color=MUTED, fontsize=9)
    bar = figure.colorbar(image, ax=ax, fraction=0.03, pad=0.01, extend="max")
    bar.set_label("KS", color=MUTED)
    bar.outline.set_visible(False)
    return figure


def _windows_axis(ax: Axes, slices: Sequence[Slice]) -> None:
    def when(position: float, _: object) -> str:
        k = round(position)
        return f"{k}\n{moment(slices[k].start_ns)[5:16].replace('T', ' ')}" if 0 <= k < len(slices) else ""

    ax.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    ax.xaxis.set_major_formatter(FuncFormatter(when))
    ax.set_xlim(-0.5, len(slices) - 0.5)
    ax.set_xlabel("window, and its start in UTC", color=MUTED)


def _moved(outcome: Outcome) -> list[Alarm]:
    """The first alarm of each feature, as many as there is room for."""
    first: dict[str, Alarm] = {}
    for alarm in sorted(outcome.alarms, key=lambda alarm: (alarm.severity != "page", alarm.opened_window)):
        if alarm.feature is not None:
            first.setdefault(alarm.feature, alarm)
    return list(first.values())[:MOST_HISTOGRAMS]


def _histograms(outcome: Outcome, alarms: Sequence[Alarm]) -> Figure:
    columns = min(3, len(alarms))
    rows = -(-len(alarms) // columns)
    figure = Figure(figsize=(9.4, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for ax, alarm in zip(axes, alarms, strict=False):
        _histogram(ax, outcome, alarm)
    for ax in axes[len(alarms) :]:
        ax.set_visible(False)
    for ax in axes[::columns]:
        ax.set_ylabel("share of values")
    axes[0].legend(frameon=False, fontsize=8, loc="best")
    return figure


def _histogram(ax: Axes, outcome: Outcome, alarm: Alarm) -> None:
    names = [feature.name for feature in outcome.info.manifest.features]
    assert alarm.feature is not None, "chosen for its feature"
    j = names.index(alarm.feature)
    start, stop = _covered(outcome, alarm)
    devices = set(alarm.devices)
    after = _shares(outcome, outcome.slices[start:stop], j, devices)
    if outcome.history:
        before = _shares(outcome, outcome.history, j, devices)
    else:
        found = column_counts(outcome.info.reference.spec, outcome.info.reference.total, j)
        before = found / max(1, int(found.sum()))
    places = np.arange(len(before))
    ax.bar(
        places - 0.2, before, width=0.4, color=REFERENCE, label="history" if outcome.history else "training"
    )
    ax.bar(
        places + 0.2,
        after,
        width=0.4,
        color=FLEET,
        label=f"windows {start} to {stop - 1}" if stop - start > 1 else f"window {start}",
    )
    ax.set_title(alarm.feature, loc="left", fontweight="bold", fontsize=10)
    _cell_ticks(ax, outcome, j)


def _shares(outcome: Outcome, slices: Sequence[Slice], j: int, devices: set[DeviceId]) -> NDArray[np.float64]:
    info = outcome.info
    profiles = [
        reading.profile
        for found in slices
        for reading in found.readings
        if not devices or reading.device in devices
    ]
    total = merge_all(info.reference.spec, profiles, probabilities=info.manifest.probabilities)
    counts = column_counts(info.reference.spec, total, j)
    return np.asarray(counts / max(1, int(counts.sum())))


def _cell_ticks(ax: Axes, outcome: Outcome, j: int) -> None:
    """Cells by the values between them; those of a category by its names."""
    feature = outcome.info.manifest.features[j]
    edges = outcome.info.reference.spec.columns[j].edges
    if feature.kind == "category":
        words = ["unseen", *(str(value) for value in feature.vocabulary)][: len(edges) + 1]
        step = -(-len(words) // 8)
        ax.set_xticks(range(0, len(words), step), [word[:10] for word in words[::step]], fontsize=7.5)
        return
    step = -(-len(edges) // 6)
    ax.set_xticks(
        [k + 0.5 for k in range(0, len(edges), step)], [f"{edge:.3g}" for edge in edges[::step]], fontsize=7.5
    )


_Curves = dict[str, tuple[NDArray[np.float64], NDArray[np.float64] | None]]


def _curves(outcome: Outcome) -> _Curves:
    """Accuracy in each window, NaN where it is not known, and the half width of its interval where there is one."""

    def curve(values: Sequence[float | None]) -> NDArray[np.float64]:
        return np.array([np.nan if value is None else value for value in values], np.float64)

    found: _Curves = {
        "known": (curve([accuracy(one) for one in outcome.slices]), None),
        "estimated": (
            curve([one.estimated for one in outcome.estimates]),
            curve([one.half for one in outcome.estimates]),
        ),
    }
    return {name: (line, half) for name, (line, half) in found.items() if np.isfinite(line).any()}


def _accuracy(outcome: Outcome, curves: _Curves) -> Figure:
    figure = Figure(figsize=(9.4, 2.8), layout="constrained")
    ax = figure.subplots()
    for alarm in outcome.alarms:
        if alarm.feature is None:
            start, stop = _covered(outcome, alarm)
            ax.axvspan(start - 0.5, stop - 0.5, color=FLEET, alpha=0.12, linewidth=0)
    colours = {"known": GOOD, "estimated": REFERENCE}
    places = np.arange(len(outcome.slices))
    for name, (line, half) in curves.items():
        ax.plot(places, line, color=colours[name], marker="o", markersize=3, linewidth=1.6, label=name)
        if half is not None:
            ax.fill_between(places, line - half, line + half, color=colours[name], alpha=0.15, linewidth=0)
    _windows_axis(ax, outcome.slices)
    every = np.concatenate([line for line, _ in curves.values()])
    low, high = float(np.nanmin(every)), float(np.nanmax(every))
    room = max(0.05, (high - low) * 0.6)  # so that noise does not look like a fall
    ax.set_ylim(max(0.0, (low + high) / 2 - room), min(1.0, (low + high) / 2 + room))
    ax.set_ylabel("accuracy")
    ax.grid(axis="y", color="#e9edf1")
    ax.legend(frameon=False, loc="lower left", ncols=2, fontsize=8)
    return figure

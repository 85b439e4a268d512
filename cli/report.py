"""One self-contained HTML file: the demonstration's figures and plots, as inline SVG, without a network."""

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from cli.page import FLEET, GOOD, MUTED, REFERENCE, page, plotting, section, svg, table

ARMS = ("#9aa5b4", "#3b6fb6", "#2f8f5b", "#8d5aa8")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class FeatureShift:
    """One feature that moved: its edges (E,), the training groups' cumulative shares (G, E) and the devices' (D, E)."""

    name: str
    edges: NDArray[np.float64]
    reference: NDArray[np.float64]
    fleet: NDArray[np.float64]
    score: float
    psi: float


@dataclass(frozen=True, slots=True, kw_only=True)
class AccuracyPoint:
    """Labelled and correct rows of one arm in one slice of time; ``seconds`` since the story began."""

    seconds: float
    arm: str
    labelled: int
    correct: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingPoint:
    """How many devices reported windows of each version in one slice of time."""

    seconds: float
    devices: Mapping[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Something that happened, to be marked in time."""

    seconds: float
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """What the page shows. ``tables`` are titles with rows of cells, the first row being the head."""

    title: str
    lead: str
    shifts: Sequence[FeatureShift]
    cohort: str
    accuracy: Sequence[AccuracyPoint]
    serving: Sequence[ServingPoint]
    moments: Sequence[Moment]
    tables: Sequence[tuple[str, Sequence[Sequence[str]]]]


def render(report: Report) -> str:
    """The page as HTML text."""
    with plotting():
        plots = [
            (
                "What moved",
                (
                    "Cumulative share of rows at every cell edge: training groups and devices of "
                    f"{report.cohort} (thin), and their means (thick). Dashed: where the means differ most."
                ),
                _shifts(report.shifts) if report.shifts else "",
            ),
            (
                "Accuracy, from the labelled and correct counts in the windows",
                "People 7 to 10, whom no model was trained on.",
                _accuracy(report.accuracy, report.moments),
            ),
            (
                "Who serves what",
                "Devices by the model their windows came from.",
                _serving(report.serving, report.moments),
            ),
        ]
    sections = [section(title, caption, drawn) for title, caption, drawn in plots if drawn]
    sections += [section(title, "", table(rows)) for title, rows in report.tables]
    return page(report.title, report.lead, sections)


def _shifts(shifts: Sequence[FeatureShift]) -> str:
    columns = min(3, len(shifts))
    rows = -(-len(shifts) // columns)
    figure = Figure(figsize=(9.4, 2.9 * rows), layout="constrained")
    axes = np.atleast_1d(figure.subplots(rows, columns, squeeze=False)).ravel()
    for ax, shift in zip(axes, shifts, strict=False):
        for lines, colour, who in ((shift.reference, REFERENCE, "training"), (shift.fleet, FLEET, "devices")):
            ax.plot(shift.edges, lines.T, color=colour, alpha=0.28, linewidth=0.8)
            ax.plot(shift.edges, lines.mean(axis=0), color=colour, linewidth=2.2, label=who)
        gap = np.abs(shift.reference.mean(axis=0) - shift.fleet.mean(axis=0))
        ax.axvline(shift.edges[int(gap.argmax())], color=MUTED, linewidth=0.9, linestyle="--")
        ax.set_title(shift.name, loc="left", fontweight="bold", fontsize=10.5, pad=20)
        ax.text(
            0,
            1.03,
            f"score {shift.score:.1f} · PSI {shift.psi:.1f}",
            transform=ax.transAxes,
            color=MUTED,
        )
        ax.set_ylim(-0.02, 1.02)
    for ax in axes[len(shifts) :]:
        ax.set_visible(False)
    axes[0].set_ylabel("share of rows ≤ x")
    axes[0].legend(frameon=False, loc="best")
    return svg(figure)


def _mark(ax: Axes, moments: Sequence[Moment]) -> None:
    for number, moment in enumerate(moments, 1):
        ax.axvline(moment.seconds, color=MUTED, linewidth=0.8, linestyle=":")
        ax.annotate(
            str(number),
            (moment.seconds, 1.0),
            xycoords=("data", "axes fraction"),
            xytext=(0, 7 + 11 * (number % 2)),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=MUTED,
        )


def _legend_of(moments: Sequence[Moment]) -> str:
    items = "".join(f"<li>{html.escape(m.text)} ({m.seconds:.0f} s)</li>" for m in moments)
    return f"<ol style='columns:2;color:{MUTED};margin:6px 0 0'>{items}</ol>"


def _accuracy(points: Sequence[AccuracyPoint], moments: Sequence[Moment]) -> str:
    figure = Figure(figsize=(9.4, 3.2), layout="constrained")
    ax = figure.subplots()
    for colour, arm in zip((REFERENCE, FLEET, GOOD), sorted({p.arm for p in points}), strict=False):
        found = [p for p in points if p.arm == arm and p.labelled]
        x = [p.seconds for p in found]
        y = [p.correct / p.labelled for p in found]
        ax.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=3, label=arm)
    _mark(ax, moments)
    ax.set_ylim(0.3, 1.0)
    ax.set_xlabel("seconds since the story began")
    ax.set_ylabel("accuracy")
    ax.legend(frameon=False, loc="lower left", ncols=3)
    return svg(figure) + _legend_of(moments)


def _serving(points: Sequence[ServingPoint], moments: Sequence[Moment]) -> str:
    figure = Figure(figsize=(9.4, 2.6), layout="constrained")
    ax = figure.subplots()
    versions = sorted({v for p in points for v in p.devices})
    x = [p.seconds for p in points]
    stacks = [[p.devices.get(v, 0) for p in points] for v in versions]
    ax.stackplot(
        x, stacks, labels=versions, colors=[ARMS[1 + i % 3] for i in range(len(versions))], alpha=0.8
    )
    _mark(ax, moments)
    ax.set_xlabel("seconds since the story began")
    ax.set_ylabel("devices")
    ax.set_ylim(0, 1.25 * max(map(sum, zip(*stacks, strict=True)), default=1))
    ax.legend(frameon=False, loc="upper left", ncols=3)
    return svg(figure)

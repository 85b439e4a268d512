"""Pages of the command line: self-contained HTML with inline SVG plots, without a network."""

import html
import io
from collections.abc import Sequence
from contextlib import AbstractContextManager

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#1d2430"
MUTED = "#6b7686"
REFERENCE = "#3b6fb6"
FLEET = "#d9662b"
GOOD = "#2f8f5b"

STYLE = f"""
body {{ font: 15px/1.5 system-ui, sans-serif; color: {INK}; background: #f6f7f9; margin: 0; }}
main {{ max-width: 980px; margin: 0 auto; padding: 24px; }}
h1 {{ font-size: 26px; margin: 8px 0; }} h2 {{ font-size: 18px; margin: 0 0 4px; }}
p {{ margin: 0 0 12px; color: {MUTED}; }} .lead {{ color: {INK}; max-width: 75ch; }}
section {{ background: #fff; border: 1px solid #e3e7ec; border-radius: 8px; padding: 18px; margin: 18px 0;
  overflow-x: auto; }}
svg {{ width: 100%; height: auto; }}
table {{ border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }}
th, td {{ text-align: left; padding: 5px 10px 5px 0; border-bottom: 1px solid #e9edf1; vertical-align: top; }}
th {{ color: {MUTED}; font-weight: 600; }} td:first-child {{ white-space: nowrap; }}
"""


def plotting() -> AbstractContextManager[None]:
    """How plots look; they are drawn inside of it."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "skiff",
            "font.family": "sans-serif",
            "font.size": 9.5,
            "text.color": INK,
            "axes.labelcolor": INK,
            "axes.edgecolor": MUTED,
            "xtick.color": MUTED,
            "ytick.color": MUTED,
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )


def svg(figure: Figure) -> str:
    """The figure as SVG for a page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, bbox_inches="tight")
    text = stream.getvalue()
    return text[text.index("<svg") :]


def section(title: str, caption: str, body: str) -> str:
    """A part of a page; ``body`` is HTML, the rest text."""
    said = f"<p>{html.escape(caption)}</p>" if caption else ""
    return f"<section><h2>{html.escape(title)}</h2>{said}{body}</section>"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text, the first being the head."""
    head, *body = rows
    cells = "".join(f"<th>{html.escape(c)}</th>" for c in head)
    lines = "".join("<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>" for row in body)
    return f"<table><thead><tr>{cells}</tr></thead><tbody>{lines}</tbody></table>"


def page(title: str, lead: str, sections: Sequence[str]) -> str:
    """The whole document; ``sections`` are HTML, the rest text."""
    body = "\n".join(sections)
    return (
        "<!doctype html>\n<html lang='en'><head><meta charset='utf-8'>"
        "<meta name='viewport' content='width=device-width'>"
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{html.escape(title)}</h1><p class='lead'>{html.escape(lead)}</p>{body}"
        "</main></body></html>\n"
    )

"""Pages of the command line: self-contained HTML with inline SVG plots, without a network."""

import html
import io
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from edge_runtime.contract.errors import ConfigError, SkiffError

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


class NotWritten(SkiffError):
    """What was found could not be written where it was wanted."""


def check_place(path: Path) -> None:
    """Raises `ConfigError` where no page can be written at ``path``, before any work is done for it."""
    why = ""
    if path.is_dir():
        why = "is a folder; give the name of a file in it"
    elif not path.parent.is_dir():
        why = f"there is no folder {path.parent}"
    elif not os.access(path if path.exists() else path.parent, os.W_OK):
        why = "may not be written"
    if why:
        raise ConfigError(f"--report {path}: {why}")


def write(path: Path, text: str) -> None:
    """Writes a page; raises `NotWritten`."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as e:
        raise NotWritten(f"--report {path}: cannot be written ({e.strerror or e})") from e


def plotting() -> AbstractContextManager[None]:
    """How plots look; they are drawn inside of it."""
    return mpl.rc_context(
        {
            "svg.fonttype": "none",
            "svg.hashsalt": "skiff",
            "text.parse_math": False,  # names of features and categories may have dollars in them
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
    with warnings.catch_warnings():
        # It is the reader's browser that has the glyphs: the text of a plot is text.
        warnings.filterwarnings("ignore", r"Glyph .* missing from font", UserWarning)
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

"""Pages: names appear in plots as they are written, and what cannot be written is said."""

import warnings

import pytest
from matplotlib.figure import Figure

from cli.page import NotWritten, check_place, plotting, svg, write
from edge_runtime.contract.errors import ConfigError


def drawn(name):
    with plotting():
        figure = Figure(layout="constrained")
        ax = figure.subplots()
        ax.set_title(name)
        ax.set_xticks([0, 1], [name, "other"])
        return svg(figure)


@pytest.mark.parametrize("name", ["cost $", r"$\frac{x$", "price_$_per_$", "$0-$50"])
def test_dollars_in_names_are_dollars(name):
    assert drawn(name).count(f">{name}<") == 2


@pytest.mark.parametrize("name", ["温度", "🔥 heat"])
def test_the_glyphs_are_the_readers_business(name):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert drawn(name).count(f">{name}<") == 2


def test_a_place_where_no_page_can_be_is_refused_beforehand(tmp_path):
    check_place(tmp_path / "page.html")
    with pytest.raises(ConfigError, match=r"is a folder; give the name of a file in it"):
        check_place(tmp_path)
    with pytest.raises(ConfigError, match=r"x\.html: there is no folder .*none"):
        check_place(tmp_path / "none" / "x.html")


def test_a_place_that_nobody_may_write_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    with pytest.raises(ConfigError, match=r"page\.html: may not be written"):
        check_place(tmp_path / "page.html")


def test_a_page_on_a_full_disk_is_an_error_in_one_line(tmp_path):
    full = tmp_path / "page.html"
    full.symlink_to("/dev/full")
    with pytest.raises(NotWritten, match=r"page\.html: cannot be written \(No space left on device\)"):
        write(full, "x")

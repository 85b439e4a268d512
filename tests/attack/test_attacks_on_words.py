"""Words that somebody else chose, where a person or a machine reads them."""

import io
import json
import logging
from contextlib import closing

import pytest
from typer.testing import CliRunner

from aggregator.adapters.ledger import Ledger
from aggregator.config import load
from cli.app import app
from edge_runtime.adapters.logs import JsonLines
from edge_runtime.core import lifecycle
from tests.support.fleet import device as ledger_device

FORGED = 'too slow\n{"level": "info", "event": "committed"}\r\x1b[2J\x1b]0;owned\x07\x00\x85\u2028\u202e'
SAID = "no\n\r\x1b[2J\x07\u202e[red]x[/red]"


@pytest.mark.attack("A61")
def test_a_reason_that_would_forge_a_line_of_the_log(device):
    """What a child or a peer said becomes one line of JSON, whatever it holds."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(JsonLines("device-1"))
    log = logging.getLogger("skiffd")
    log.addHandler(handler)
    try:
        device.hear(
            {"ok": False, "stage": "probe", "reason": FORGED, "retry": True, "digest": "", "release": ""}
        )
    finally:
        log.removeHandler(handler)
    [line] = stream.getvalue().splitlines()
    assert line.isascii()
    assert line.isprintable()
    said = json.loads(line)
    assert (said["event"], said["detail"]) == ("update_failed", f"stage=probe reason={FORGED}")
    assert len(lifecycle.brief("x" * 10_000)) == lifecycle.MAX_REASON


@pytest.mark.attack("A62")
def test_a_device_that_says_something_to_the_operators_terminal(tmp_path):
    """`skiff fleet` shows what a stolen device reports; it does not do it."""
    path = tmp_path / "aggregator.toml"
    path.write_text('fleet = "fleet"\n', encoding="utf-8")
    record = ledger_device("dev-1", serving="a" * 64, outcome="refused", reason=SAID)
    with closing(Ledger(load(path).ledger_path)) as ledger, ledger.transaction():
        ledger.put_device(record)
    done = CliRunner().invoke(app, ["fleet", str(path)])
    assert done.exit_code == 0, done.output
    assert all(line.isprintable() for line in done.stdout.split("\n"))
    said = "".join(done.stdout.split())  # the table breaks lines where it likes
    assert r"refusedno\n\r\x1b[2J\x07\u202e[red]x[/red]" in said

"""`cli.orders`: an order that the operator was told has failed is never carried out later."""

import json
import threading
from contextlib import closing

import pytest
from typer.testing import CliRunner

from aggregator.adapters.ledger import Ledger
from aggregator.config import load
from cli import orders
from cli.app import app
from cli.view import FleetView
from edge_runtime.contract.errors import ConfigError

RUN = CliRunner()


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "aggregator.toml"
    path.write_text('fleet = "fleet"\n', encoding="utf-8")
    return path


@pytest.fixture
def ledger(config, monkeypatch):
    monkeypatch.setattr(orders, "ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(orders, "GRACE_SECONDS", 0.2)
    monkeypatch.setattr(orders, "_POLL_SECONDS", 0.01)
    with closing(Ledger(load(config).ledger_path)) as ledger:
        yield ledger


def halt(config):
    return orders.order(FleetView(config), "halt", {"model": "watch"}, by="ann", why="")


def test_an_order_that_nobody_takes_is_withdrawn_and_carried_out_by_nobody(config, ledger):
    done = RUN.invoke(app, ["rollout", "order", str(config), "halt", "--model", "watch"])
    assert done.exit_code == 2
    assert "no answer within 0.2 s, withdrawn" in done.stderr
    assert ledger.pending() == ()
    assert ledger.answer(1) == ("withdrawn", "")


def test_one_that_was_taken_in_the_last_moment_is_answered(config, ledger, monkeypatch):
    monkeypatch.setattr(orders, "GRACE_SECONDS", 60.0)
    withdraw = FleetView.withdraw

    def too_late(view, number):
        assert [r.number for r in ledger.pending()] == [number]
        said = withdraw(view, number)
        with ledger.transaction():
            ledger.put_answer(number, accepted=True, reason="r-1")
        return said

    monkeypatch.setattr(FleetView, "withdraw", too_late)
    assert halt(config) == "r-1"


def test_one_that_was_taken_and_is_not_answered_is_not_said_to_be_withdrawn(config, ledger):
    taken = threading.Event()

    def take():
        with closing(Ledger(load(config).ledger_path)) as service:
            while not taken.is_set():
                if service.pending():
                    taken.set()

    service = threading.Thread(target=take)
    service.start()
    try:
        with pytest.raises(ConfigError, match="has taken it and not answered yet"):
            halt(config)
    finally:
        taken.set()
        service.join()
    assert ledger.answer(1)[0] == "pending"


def test_a_rollout_is_of_the_published_model_whose_digest_begins_so(config, ledger, monkeypatch):
    digest = "0123456789ab" + "c" * 52
    folder = load(config).registry / "auto" / "watch"
    folder.mkdir(parents=True)
    (folder / f"{digest}.onnx").touch()
    asked: list[str] = []

    def answer(view, number):
        asked.extend(json.loads(request.document)["candidate"] for request in ledger.pending())
        return "accepted", "r-1"

    monkeypatch.setattr(FleetView, "answer", answer)
    words = ["rollout", "start", str(config), "0123456789ab", "--model", "watch"]
    assert RUN.invoke(app, words).stdout == "r-1\n"
    assert asked == [digest]
    (folder / f"{digest[:63]}d.onnx").touch()
    done = RUN.invoke(app, words)
    assert (done.exit_code, "begins the digests of 2 models" in done.stderr) == (2, True)


@pytest.mark.parametrize(("taken", "words"), [(False, "halt: withdrawn"), (True, "too late to withdraw it")])
def test_ctrl_c_withdraws_what_nobody_has_taken(config, ledger, monkeypatch, capsys, taken, words):
    def interrupted(view, number):
        if taken:
            ledger.pending()
        raise KeyboardInterrupt

    monkeypatch.setattr(FleetView, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        halt(config)
    assert words in capsys.readouterr().err
    assert ledger.answer(1)[0] == ("pending" if taken else "withdrawn")


@pytest.mark.parametrize(
    "words",
    [
        ["rollout", "start", "CONFIG", "a" * 64, "--model", "watch"],
        ["rollout", "order", "CONFIG", "halt", "--model", "watch"],
        ["acknowledge", "CONFIG", "1"],
    ],
)
def test_where_no_aggregator_ever_ran_nothing_is_asked_and_nothing_made(config, words):
    done = RUN.invoke(app, [str(config) if word == "CONFIG" else word for word in words])
    assert done.exit_code == 2
    assert "no such store yet" in done.stderr
    assert sorted(path.name for path in config.parent.iterdir()) == ["aggregator.toml"]

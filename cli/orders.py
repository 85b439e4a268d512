"""Orders to the running service: left in the ledger, waited for, and taken back when nobody answers."""

import time
from collections.abc import Mapping

from cli.output import note
from cli.view import FleetView
from edge_runtime.contract.errors import ConfigError

ANSWER_SECONDS = 15.0
GRACE_SECONDS = 5.0
"""How much longer to wait for an order that was taken too late to withdraw it."""
_POLL_SECONDS = 0.1


def order(view: FleetView, kind: str, document: Mapping[str, object], *, by: str, why: str) -> str:
    """Leaves an order, waits for its answer and returns it.

    An order that nobody takes, or that is interrupted before, is withdrawn: no service carries it out later.

    Raises:
        ConfigError: there is no ledger, the order is refused, or nobody answers.
    """
    number = view.request(kind, document, by=by, why=why)
    try:
        state, answer = _waited(view, number, ANSWER_SECONDS)
        if state == "pending":
            state, answer = view.withdraw(number)
        if state == "pending":
            state, answer = _waited(view, number, GRACE_SECONDS)
    except KeyboardInterrupt:
        state, answer = view.withdraw(number)
        if state == "pending":
            answer = "the aggregator has it; skiff rollout status says what comes of it"
        note(f"{kind}: " + (state if state == "withdrawn" else f"too late to withdraw it, {state}: {answer}"))
        raise
    match state:
        case "accepted":
            return answer
        case "refused":
            raise ConfigError(f"{kind}: {answer}")
        case "withdrawn":
            raise ConfigError(
                f"{kind}: no answer within {ANSWER_SECONDS:g} s, withdrawn; is the aggregator running (skiff serve)?"
            )
        case _:
            raise ConfigError(
                f"{kind}: the aggregator has taken it and not answered yet; see skiff rollout status"
            )


def _waited(view: FleetView, number: int, seconds: float) -> tuple[str, str]:
    """What became of an order after ``seconds``, or earlier when it is answered."""
    deadline = time.monotonic() + seconds
    while (said := view.answer(number))[0] == "pending" and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
    return said

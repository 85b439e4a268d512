"""What the documents of orders say, read before they are decided on."""

import json
from typing import Final

from aggregator.records import Request
from edge_runtime.contract import ids
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest

START: Final = "start_rollout"


def read_request(request: Request) -> Fields:
    """The request's document; raises `ContractError`."""
    try:
        return Fields(json.loads(request.document), request.kind)
    except (ValueError, RecursionError) as e:
        raise ContractError(f"{request.kind}: not JSON ({e})") from e


def candidate_of(request: Request) -> Digest | None:
    """The digest a request to start a rollout names, None when there is none to look up."""
    try:
        return ids.digest(read_request(request).text("candidate", "")) if request.kind == START else None
    except ContractError:
        return None


def name_of(request: Request) -> str:
    """The name a request to start a rollout asks for, empty when it asks for none."""
    try:
        return read_request(request).text("name", "") if request.kind == START else ""
    except ContractError:
        return ""

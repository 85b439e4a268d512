"""Metadata and models by whichever way brings them. Any number of ways is as safe as one: what comes is verified."""

import errno
import logging
import time
from collections.abc import Iterator, Sequence

from edge_runtime.adapters.slots import Slots
from edge_runtime.carriers import Carrier
from edge_runtime.contract.errors import ArtifactError, ContractError, LinkError
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.trust import Target
from edge_runtime.truststore import TrustStore
from edge_runtime.update_job import Refusal

log = logging.getLogger("skiffd")


class Fetching:
    """``carriers`` in the order in which they are tried, until ``deadline`` in monotonic seconds.

    A way after which another could be tried gets half of the time that is left, so that a slow one keeps nothing back.
    """

    def __init__(self, carriers: Sequence[Carrier], *, deadline: float) -> None:
        self._carriers = carriers
        self._deadline = deadline

    def refresh(self, trusted: TrustStore) -> None:
        """Has ``trusted`` verify the current metadata; raises `LinkError` or `ContractError` when no way has any."""
        problems: list[tuple[Carrier, LinkError | ContractError]] = []
        for carrier, until in self._turns(self._carriers):
            try:
                trusted.refresh_from(carrier.metadata(trusted.known_version, until))
            except (LinkError, ContractError) as e:
                problems.append((carrier, e))
            else:
                return
        if len(problems) == 1:
            raise problems[0][1]
        raise LinkError(_all(problems))

    def bring(self, target: Target, slots: Slots) -> None:
        """Installs ``target`` in ``slots``, going on with what an earlier job left of it; raises `Refusal`."""
        if slots.has(target.digest, verify=True):
            return
        problems = [(carrier, carrier.problem(target)) for carrier in self._carriers]
        able = [carrier for carrier, problem in problems if not problem]
        if not able:
            raise Refusal(_all(problems), retry=False, digest=target.digest, stage="fetch")
        failed: list[tuple[Carrier, Exception]] = []
        for carrier, until in self._turns(able):
            try:
                _bring(carrier, target, slots, until)
            except (LinkError, ContractError, ArtifactError) as e:
                failed.append((carrier, e))
            else:
                return
        # Nothing is held against the model: somebody on the way lost or changed it.
        stage = "verify" if any(isinstance(e, ArtifactError) for _, e in failed) else "fetch"
        raise Refusal(f"model {target.digest}: {_all(failed)}", retry=True, stage=stage)

    def _turns(self, carriers: Sequence[Carrier]) -> Iterator[tuple[Carrier, float]]:
        for carrier in carriers[:-1]:
            yield carrier, (time.monotonic() + self._deadline) / 2
        yield carriers[-1], self._deadline


def _bring(carrier: Carrier, target: Target, slots: Slots, until: float) -> None:
    """Raises `ArtifactError` when what came is not the model, or could not be read again."""
    path = slots.staging(target.digest)
    alone = not path.exists() or not path.stat().st_size
    try:
        carrier.blob(target, path, until)
        slots.install(target.digest)
    except ArtifactError as e:
        if not alone and not path.exists():  # it went on with what was spoiled before, and is gone now
            _bring(carrier, target, slots, until)
            return
        if isinstance(e.__cause__, OSError):
            raise
        raise ArtifactError(f"{e}: publish the model again") from e
    except OSError as e:
        if e.errno == errno.EIO:
            _drop(target.digest, slots)
        raise


def _drop(digest: Digest, slots: Slots) -> None:
    """What the disk could not write is not gone on with: it may be in memory only, and a later flush says nothing."""
    try:
        slots.drop(digest)
    except OSError as e:
        log.warning("download_kept digest=%s reason=%s", digest, e)


def _all(problems: Sequence[tuple[Carrier, object]]) -> str:
    """What is wrong with each way; with one, its name says nothing."""
    if len(problems) == 1:
        return str(problems[0][1])
    return "; ".join(f"{carrier.name}: {problem}" for carrier, problem in problems)

"""Revisions that devices follow and this ledger does not know of.

A ledger that was lost begins at revision 1 again, and devices refuse a release that is older than what they follow.
They say in their status which revision that is. So the next release is numbered above it, as after a backup was
restored, and the release in force is published again under such a number.

What a device says is not proven. One that lies can make revisions jump, so there are bounds: no jump beyond `HIGHEST`,
and no release published again for this reason within `REST_NS` of the last time.
"""

from collections.abc import Container
from dataclasses import dataclass
from typing import Final

from aggregator.records import SKIPPED_REVISIONS, DeviceRecord
from edge_runtime.contract.ids import CohortId, DeviceId, ModelName

HIGHEST: Final = 1 << 47
"""No fleet published so many releases. From here to 2^63, where numbers end, there is room for all that follow."""
REST_NS: Final = 600 * 1_000_000_000

Family = tuple[CohortId, ModelName]


@dataclass(frozen=True, slots=True)
class Claim:
    """A device says that it follows this revision."""

    revision: int
    device: DeviceId

    def forgotten(self, cohort: CohortId, known: int, following: int) -> str:
        """What to say when the ledger knows ``known`` revisions only, and goes on with ``following``."""
        return (
            f"device {self.device} follows revision {self.revision} of cohort {cohort}, of which this ledger knows no "
            f"more than {known}: was it lost? Releases are numbered from {following} on, so that devices take them"
        )

    def beyond_belief(self) -> str:
        """What to say when the revision is above `HIGHEST`."""
        return (
            f"device {self.device} says that it follows revision {self.revision}, which no fleet reaches: if it does, "
            "it takes no release from here until the director has another key"
        )


class Claims:
    """The highest revision that devices of each cohort and model say they follow. Not thread-safe."""

    def __init__(self) -> None:
        self._highest: dict[Family, Claim] = {}
        self._renewed: dict[Family, int] = {}
        self._absurd: set[DeviceId] = set()

    def saw(self, record: DeviceRecord, elsewhere: Container[str] = (), known: int = 0) -> Claim | None:
        """Takes note of what ``record`` says; returns what is beyond belief, once for each device.

        A device that changed its cohort still follows a release of the one it left; ``elsewhere`` are their rollouts.
        What is at most ``known``, the cohort's last number here, is no news, however high it is.
        """
        absurd = None
        for report in record.models:
            if report.rollout in elsewhere or report.revision <= known:
                continue
            claim = Claim(report.revision, record.device)
            family = CohortId(record.cohort), report.model
            if claim.revision > HIGHEST:
                absurd = None if record.device in self._absurd else claim
                self._absurd.add(record.device)
            elif claim.revision > self._highest.get(family, Claim(0, record.device)).revision:
                self._highest[family] = claim
        return absurd

    def next(self, cohort: CohortId, known: int) -> tuple[int, Claim | None]:
        """The number of the cohort's next release, ``known`` being its last, and whose claim made it jump."""
        claims = [claim for family, claim in self._highest.items() if family[0] == cohort]
        highest = max(claims, key=lambda claim: claim.revision, default=None)
        if highest is None or highest.revision <= known:
            return known + 1, None
        return highest.revision + SKIPPED_REVISIONS, highest

    def refused(self, family: Family, revision: int, now_ns: int) -> bool:
        """Whether a device would refuse the release in force, ``revision``, and it is time to publish it again."""
        claim = self._highest.get(family)
        if claim is None or claim.revision <= revision:
            return False
        renewed = self._renewed.get(family)
        return renewed is None or not 0 <= now_ns - renewed < REST_NS

    def renewed(self, family: Family, now_ns: int) -> None:
        """The release in force was published again."""
        self._renewed[family] = now_ns

"""What waits to leave the device: the outbox, what it would not take, and what it had to give up."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from edge_runtime.adapters.outbox import Outbox, Record
from edge_runtime.config import DaemonConfig
from edge_runtime.contract.errors import BudgetExceeded, SkiffError
from edge_runtime.core import events as core
from edge_runtime.core import rollup

MAX_UNKEPT: Final = 256
"""Messages kept in memory while the disk refuses them; beyond that the oldest are lost."""
GAP_SECONDS: Final = 60.0

if TYPE_CHECKING:
    from edge_runtime.adapters.status_report import OutboxReport

log = logging.getLogger("skiffd")


class Keeper:
    """The daemon's outbox. It never raises for the disk's sake: a device that cannot write still serves.

    Not thread-safe, but `report` may be read from any thread. Raises `SkiffError` when another process has the file.
    """

    def __init__(self, config: DaemonConfig) -> None:
        self._max_bytes: Final = config.outbox_bytes
        self._outbox: Final = Outbox(
            config.state_dir / "outbox.db",
            max_bytes=config.outbox_bytes,
            merge=rollup.merge,
            choose=rollup.choose,
        )
        self._unkept: deque[Record] = deque()
        self._refusal = ""
        self._logged = ""
        self._told = self._passed = ""
        self._heard = False
        self._gaps_at = 0.0
        self._lost = self._merged = 0

    def append(self, action: core.Append) -> None:
        """Keeps a message: on disk, or in memory until the disk takes it."""
        self._unkept.append(
            Record(session=action.session, seq=action.seq, topic=action.topic, payload=action.payload)
        )
        self._flush()
        while len(self._unkept) > MAX_UNKEPT:
            self._lose(self._unkept.popleft(), "the disk refuses it, and memory is full of such")

    def about_to_leave(self, action: core.Send) -> list[Record]:
        """Records to publish now; that they may have been sent is durable, or none are given."""
        try:
            records = self._outbox.pending(action.room, action.skip)
            self._outbox.mark_sent((record.session, record.seq) for record in records)
        except SkiffError as e:
            self._complain(str(e))
            return []
        return records

    def trim(self, action: core.Trim) -> None:
        """Forgets what the aggregator has stored. Where that fails it is sent and acknowledged again."""
        try:
            gone = self._outbox.trim(action.session, action.seqs)
        except SkiffError as e:
            self._complain(str(e))
            return
        if gone:
            self._heard, self._refusal = True, ""

    def discard(self, record: Record, why: str) -> None:
        """Gives up a record that can never leave."""
        self._lose(record, why)
        self.trim(core.Trim(record.session, (record.seq,)))

    def tick(self, now_seconds: float) -> Iterator[core.AgentEvent]:
        """Tries again what the disk refused, and gives what the centre should know of.

        What was given up is told only when the aggregator has stored something: else the telling fills the outbox, too.
        """
        self._flush()
        # Trouble that came and went since the last tick is told, too.
        trouble, self._passed = self.trouble or self._outbox.set_aside or self._passed, ""
        if trouble and trouble != self._told:
            self._told = trouble
            self._log(trouble)
            yield core.Noticed("outbox_trouble", (("reason", trouble),))
        elif not trouble:
            self._told = self._logged = self._passed = ""
        if self._heard and now_seconds >= self._gaps_at:
            self._heard, self._gaps_at = False, now_seconds + GAP_SECONDS
            yield from self._gaps()

    @property
    def trouble(self) -> str:
        """Why records are not on the disk now: it refuses them, or never could be written; "" when they are."""
        return self._refusal or self._outbox.volatile

    @property
    def report(self) -> "OutboxReport":
        """Its figures."""
        from edge_runtime.adapters.status_report import OutboxReport  # noqa: PLC0415 (the first answer does without)

        return OutboxReport(
            records=len(self._outbox) + len(self._unkept),
            size_bytes=self._outbox.size_bytes,
            max_bytes=self._max_bytes,
            merged=self._merged,
            lost=self._lost,
            trouble=self.trouble,
        )

    def close(self) -> None:
        """Closes the file. What the disk refused to the last is lost."""
        self._flush()
        for record in self._unkept:
            self._lose(record, "the disk refused it until the end")
        self._outbox.close()

    def _flush(self) -> None:
        while self._unkept:
            record = self._unkept[0]
            try:
                self._outbox.append(record.session, record.seq, record.topic, record.payload)
            except BudgetExceeded as e:
                self._lose(self._unkept.popleft(), str(e))
            except SkiffError as e:
                self._complain(str(e))
                return
            else:
                self._unkept.popleft()
                self._refusal = ""
                kept = (record.session, record.seq, record.topic, len(self._outbox))
                log.info("record_kept session=%s seq=%d topic=%s waiting=%d", *kept)

    def _gaps(self) -> Iterator[core.AgentEvent]:
        try:
            gaps = self._outbox.gaps()
            for gap in gaps:
                figures = ("number", "windows", "records", "start_ns", "end_ns")
                detail = tuple((name, str(getattr(gap, name))) for name in figures)
                yield core.GapFound(f"records_{gap.kind}", (("topic", gap.topic), *detail))
                self._merged += gap.records if gap.kind == "merged" else 0
                self._lost += gap.records if gap.kind == "dropped" else 0
            self._outbox.settle(gaps)
        except SkiffError as e:
            self._complain(str(e))

    def _lose(self, record: Record, why: str) -> None:
        self._lost += 1
        log.error("record_lost seq=%d topic=%s reason=%s", record.seq, record.topic, why)

    def _complain(self, reason: str) -> None:
        self._refusal = self._passed = reason
        self._log(reason)

    def _log(self, reason: str) -> None:
        if reason != self._logged:
            self._logged = reason
            log.error("outbox_trouble reason=%s", reason)

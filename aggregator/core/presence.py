"""Which status message is the device's last word.

A session is one start of a device's daemon; its births carry a rising ``seq``, its last will says that it
ended. The broker publishes a will when it notices that a connection broke, which may be after the device is
back. Rules:

1. Messages of a session that a newer one has replaced change nothing: a late will cannot hide a newer birth. Rule 5
   is the one exception.
2. Within a session a birth counts when its ``seq`` is higher than any birth before it, also after a death: a
   device that lost its link and came back says so under a new ``seq``. A repeated birth never undoes a death.
3. A death of the session in force always counts. It may be late by the device's own reconnection, or come again
   behind a birth that was seen already, so the device is asked to speak up for a while: if it lives, its next
   birth undoes the death. Later the service asks when an "offline" device still sends.
4. A birth of a session never seen before replaces the session in force. A death of such a session cannot be
   told from a late will; while the device is online it only casts doubt, and the device is asked to speak up.
   Silence ends it.
5. A session that was replaced speaks again where two machines use one id: the second was stopped, and the first is
   there as before. So a birth of a replaced session whose ``seq`` is higher than any of it before casts doubt on the
   session in force, and replaces it when that is dead or in doubt already. It is in doubt itself until the device
   answers.
6. Not every end has a message: a broker that died forgets wills, and it publishes none of a device whose rights were
   withdrawn. So who is online and was not heard for long is in doubt as well, see `doubt_silent`.
"""

from dataclasses import replace
from typing import Final

from aggregator.records import DeviceRecord
from edge_runtime.contract.messages import Status

REMEMBERED_SESSIONS: Final = 32
HEARD_NS: Final = 1_000_000_000
"""How exact ``last_seen_ns`` is where nothing else changes: who sends a lot is not written down anew each time."""


def apply(record: DeviceRecord | None, status: Status, now_ns: int) -> DeviceRecord:
    """The record after ``status``; the same object when it changes nothing."""
    if record is None:
        return _fresh(status, now_ns)
    if status.session in dict(record.ended):
        return _ended_session(record, status, now_ns)
    if status.session != record.session:
        return _other_session(record, status, now_ns)
    if not status.online:
        return replace(record, online=False, doubted_ns=now_ns) if record.online else record
    if status.seq <= record.seq:
        return record
    return replace(
        record,
        seq=status.seq,
        online=True,
        attributes=status.attributes,
        models=status.models,
        last_seen_ns=now_ns,
        doubted_ns=0,
        last_exit=status.last_exit,
        restarts=status.restarts,
        clock=status.clock,
    )


def _fresh(status: Status, now_ns: int) -> DeviceRecord:
    return DeviceRecord(
        device=status.device,
        session=status.session,
        seq=status.seq if status.online else -1,
        online=status.online,
        attributes=status.attributes,
        models=status.models,
        last_seen_ns=now_ns,
        doubted_ns=0 if status.online else now_ns,
        last_exit=status.last_exit,
        restarts=status.restarts,
        clock=status.clock,
    )


def _other_session(record: DeviceRecord, status: Status, now_ns: int) -> DeviceRecord:
    if status.online:
        return _in_place_of(record, status, now_ns)
    if record.online:
        return replace(record, doubted_ns=record.doubted_ns or now_ns)
    return record


def _ended_session(record: DeviceRecord, status: Status, now_ns: int) -> DeviceRecord:
    ended = dict(record.ended)
    if not status.online or status.seq <= ended[status.session]:
        return record
    if record.online and not record.doubted_ns:
        ended[status.session] = status.seq
        return replace(record, ended=tuple(ended.items()), doubted_ns=now_ns)
    return replace(_in_place_of(record, status, now_ns), doubted_ns=now_ns)


def _in_place_of(record: DeviceRecord, status: Status, now_ns: int) -> DeviceRecord:
    older = ((session, seq) for session, seq in record.ended if session != status.session)
    ended = (*older, (record.session, record.seq))[-REMEMBERED_SESSIONS:]
    return replace(_fresh(status, now_ns), ended=ended)


def is_shared(before: DeviceRecord | None, after: DeviceRecord) -> bool:
    """Whether a session that was replaced is in force again, so that two machines have used one id."""
    return before is not None and after.session != before.session and after.session in dict(before.ended)


def doubt_silent(record: DeviceRecord, now_ns: int, heard_since_ns: int, patience_ns: int) -> DeviceRecord:
    """The record in doubt when the device is online and was not heard for ``patience_ns``; the same object otherwise.

    Nobody could be heard before ``heard_since_ns``. A device without rows sends nothing for as long as it likes, so
    this proves nothing: it is asked, and `settle` waits for its answer.
    """
    silent = record.online and now_ns - max(record.last_seen_ns, heard_since_ns) >= patience_ns
    return replace(record, doubted_ns=now_ns) if silent and not record.doubted_ns else record


def settle(record: DeviceRecord, now_ns: int, patience_ns: int) -> DeviceRecord:
    """A doubted device that stayed silent for ``patience_ns`` counts as offline."""
    if record.doubted_ns and now_ns >= record.doubted_ns + patience_ns:
        return replace(record, online=False, doubted_ns=0)
    return record


def heard(record: DeviceRecord, now_ns: int) -> DeviceRecord:
    """The device of an undoubted session sent a window or an event: doubt about it is over.

    The same object when there was none and the device was heard less than `HEARD_NS` ago.
    """
    if not record.doubted_ns and 0 <= now_ns - record.last_seen_ns < HEARD_NS:
        return record
    return replace(record, last_seen_ns=now_ns, doubted_ns=0)

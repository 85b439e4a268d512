"""What the kernel says of the clock, beside what its own call says in Python's terms."""

import ctypes

import pytest

from edge_runtime.adapters import clock

UNSYNC = 0x40


class Timex(ctypes.Structure):
    """The head of ``struct timex`` in adjtimex(2), field by field."""

    _fields_ = (
        ("modes", ctypes.c_uint),
        ("offset", ctypes.c_long),
        ("freq", ctypes.c_long),
        ("maxerror", ctypes.c_long),
        ("esterror", ctypes.c_long),
        ("status", ctypes.c_int),
        ("rest", ctypes.c_char * 400),
    )


def test_the_kernel_is_read_where_the_structure_has_its_status(tmp_path):
    timex = Timex()
    assert ctypes.CDLL(None).adjtimex(ctypes.byref(timex)) >= 0
    assert clock.is_synced(tmp_path / "absent") is not bool(timex.status & UNSYNC)


@pytest.mark.parametrize(("status", "synced"), [(UNSYNC, False), (0x2041, False), (0x2001, True), (0, True)])
def test_one_bit_decides(monkeypatch, tmp_path, status, synced):
    monkeypatch.setattr(clock, "_kernel_status", lambda: status)
    mark = tmp_path / "synchronized"
    mark.touch()
    assert clock.is_synced(mark) is synced


def test_a_kernel_that_may_not_be_asked_leaves_the_mark_of_timesyncd(monkeypatch, tmp_path):
    monkeypatch.setattr(clock, "_kernel_status", lambda: None)
    mark = tmp_path / "synchronized"
    assert clock.is_synced(mark) is None
    mark.touch()
    assert clock.is_synced(mark) is True


def test_a_refusal_of_the_call_is_no_answer(monkeypatch):
    class Library:
        @staticmethod
        def adjtimex(_):
            return -1

    monkeypatch.setattr(ctypes, "CDLL", lambda _: Library)
    assert clock._kernel_status() is None

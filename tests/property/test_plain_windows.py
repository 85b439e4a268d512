"""A window read at one go is the one that is read field by field, and what is refused is refused in the same words."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract import codec, ids, plain
from edge_runtime.contract.codec import decode, encode
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Ack
from edge_runtime.contract.profile import FIXED_POINT, CellSpec, FeatureCells, Profile, fit
from tests.golden import values
from tests.support import strategies as our

BODY = 6
SESSION = "0123456789abcdef"


def answers(data):
    """What becomes of ``data``: its message, or the words it is refused with."""
    try:
        return decode(data)
    except ContractError as e:
        return str(e)


def field_by_field(data):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plain, "read_window", lambda *_: None)
        return answers(data)


@given(our.windows())
def test_a_devices_window_is_read_at_one_go_and_the_same(window):
    data = encode(window)
    kind, origin, body = codec._open(data)
    assert kind == 2
    assert isinstance(body, list)
    at_once = plain.read_window(origin.name, origin.run, origin.seq, body, window.profile.counts)
    assert at_once is None or at_once == window
    assert (at_once is not None) == (
        window.end_ns >= window.start_ns and all(k.isascii() for k, _ in window.refused)
    )
    assert decode(data) == field_by_field(data) == window


@given(st.data(), our.windows())
def test_any_other_item_is_read_or_refused_alike(data, window):
    envelope = msgpack.unpackb(encode(window))
    numbers = st.integers(-2, 3) | st.sampled_from([2**31, 2**63 - 1, 2**63, 2**64 - 1, -(2**63)])
    strange = numbers | st.booleans() | st.binary(max_size=33) | our.plain(4)
    for _ in range(data.draw(st.integers(1, 2))):
        envelope[BODY] = data.draw(our.replaced(envelope[BODY], strange))
    try:
        changed = msgpack.packb(envelope)
    except (ValueError, OverflowError, TypeError):
        return
    assert answers(changed) == field_by_field(changed)


@given(our.damaged(our.windows().map(encode)))
def test_damage_is_read_or_refused_alike(data):
    assert answers(data) == field_by_field(data)


@pytest.mark.parametrize(
    ("at", "item"),
    [
        (0, "Not a name"),
        (1, b"\0" * 31),
        (2, b"\0" * 9),
        (3, 2**62),
        (4, 0),
        (4, True),
        (5, 2**63),
        (6, 2**63 - 1),
        (6, -1),
        (7, 1),
        (8, 1.0),
        (10, [True]),
        (10, [-1]),
        (11, [0, [0], 0, 0, 0]),
        (11, [0, [True], 0, 0, 0]),
        (11, [0, (), 0, 0]),
        (12, [600, [1], 0, 0, 0]),
        (13, [-1]),
        (13, [2**64 - 1]),
        (14, {"x": True}),
        (14, {"x": -1}),
        (17, 2**40),
    ],
)
def test_each_rule_is_kept_at_one_go(at, item):
    window = values.WINDOW
    envelope = msgpack.unpackb(encode(window))
    assert len(envelope[BODY]) == len(codec.WINDOW)
    envelope[BODY][at] = item
    data = msgpack.packb(envelope)
    _, origin, body = codec._open(data)
    assert isinstance(body, list)
    assert plain.read_window(origin.name, origin.run, origin.seq, body, window.profile.counts) is None
    assert answers(data) == field_by_field(data)


@pytest.mark.parametrize(
    ("device", "session", "seqs"),
    [
        ("a/b", SESSION, (1,)),
        ("a", "x", (1,)),
        ("a", SESSION, (-1,)),
        ("a", SESSION, (True,)),
        ("a", SESSION, tuple(range(codec.MAX_ITEMS + 1))),
    ],
)
def test_an_acknowledgement_that_no_device_takes_is_not_written(device, session, seqs):
    with pytest.raises(ContractError):
        encode(Ack(device=device, session=session, seqs=seqs))


SPEC = CellSpec(
    features=(FeatureCells("x", (0.0, 1.0)), FeatureCells("y", (0.5,))),
    score=FeatureCells("score", (0.5,)),
    classes=2,
)


@given(st.lists(our.profiles(SPEC), max_size=40), st.data())
def test_profiles_fit_together_as_each_does_alone(found, data):
    changed = []
    for profile in found:
        counts, sums, rows = profile.counts.copy(), profile.sums.copy(), profile.rows
        match data.draw(st.sampled_from(["none", "counter", "rows", "sums", "short", "swap"])):
            case "counter":
                counts[data.draw(st.integers(0, counts.size - 1))] += 1
            case "swap" if counts.sum():
                counts[counts.argmax()] -= 1
                counts[data.draw(st.integers(0, counts.size - 1))] += 1
            case "rows":
                rows = data.draw(st.sampled_from([0, rows + 1, 2**60]))
            case "sums" if sums.size:
                sums[0] = rows * FIXED_POINT + data.draw(st.integers(0, 1))
            case "short":
                counts = counts[:-1]
        changed.append(Profile(layout=profile.layout, rows=rows, counts=counts, sums=sums))
    together = fit(changed, SPEC)
    alone = []
    for profile in changed:
        try:
            profile.check(SPEC)
        except ContractError:
            alone.append(False)
        else:
            alone.append(True)
            assert plainly_fits(profile)
    assert together == alone
    assert together == [plainly_fits(profile) for profile in changed]


def plainly_fits(profile):
    """The rule, counter by counter."""
    if (
        profile.counts.size != SPEC.size
        or profile.sums.size not in (0, 1 + SPEC.classes)
        or profile.rows >= 2**53
    ):
        return False
    at = 0
    for column in SPEC.columns:
        of_column = profile.counts[at : at + column.size].tolist()
        if sum(of_column[:-1]) != profile.rows or max(of_column) > profile.rows:
            return False
        at += column.size
    if sum(profile.counts[at:].tolist()) != profile.rows:
        return False
    return max(profile.sums.tolist(), default=0) <= profile.rows * FIXED_POINT


def test_the_names_of_a_histograms_items_are_in_order():
    h = LatencyHistogram(offset=3, counts=(1, 2), zero=4, sum_ns=5, max_ns=6)
    assert plain._latency(list(codec.latency_body(h).values())) == h
    assert ids.DIGEST.fullmatch(bytes(32).hex())

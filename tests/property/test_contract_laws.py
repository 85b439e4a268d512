"""Laws of the contract: merging is exact, what is encoded is decoded, and nothing a peer sends breaks a reader."""

import json
import tracemalloc
import zlib
from itertools import pairwise

import msgpack
import numpy as np
import onnx
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.contract import ids, release
from edge_runtime.contract.codec import MAX_MESSAGE_BYTES, decode, encode
from edge_runtime.contract.errors import ArtifactError, ContractError
from edge_runtime.contract.latency import LatencyHistogram, observe_ns, relative_error
from edge_runtime.contract.manifest import KEYS, ArtifactInfo, read_info
from edge_runtime.contract.messages import Message
from edge_runtime.contract.packing import IN_STEP, MAX_COUNTERS, pack_counts, pack_planes, unpack_counts
from edge_runtime.contract.profile import Binner, Profile, empty_profile, merge_all
from edge_runtime.contract.topics import Topics
from tests.support import strategies as our
from tests.support.tiny_models import classifier, sealed

# ── profiles ───────────────────────────────────────────────────────────────────────────────────────────


@given(st.data())
def test_profiles_merge_in_any_order_and_grouping(data):
    spec = data.draw(our.specs())
    a, b, c = (data.draw(our.profiles(spec)) for _ in range(3))
    nothing = empty_profile(spec, probabilities=spec.classes > 0)
    assert a.merge(b) == b.merge(a)
    assert a.merge(b).merge(c) == a.merge(b.merge(c))
    assert a.merge(nothing) == a
    assert merge_all(spec, [a, b, c], probabilities=spec.classes > 0) == a.merge(b).merge(c)


@given(st.data())
def test_windows_of_one_stream_add_up_to_the_stream(data):
    spec = data.draw(our.specs())
    parts = [data.draw(our.seen_rows(spec)) for _ in range(3)]
    probabilities = spec.classes > 0
    in_windows, at_once = (Binner(spec, probabilities=probabilities) for _ in range(2))
    windows = []
    for part in parts:
        in_windows.observe(*part)
        windows.append(in_windows.take())
    at_once.observe(*(np.concatenate(column) for column in zip(*parts, strict=True)))
    whole = at_once.take()
    assert merge_all(spec, windows, probabilities=probabilities) == whole
    assert whole.rows == sum(len(rows) for rows, _, _ in parts)


@given(st.data())
def test_every_value_lands_in_the_cell_its_definition_names(data):
    spec = data.draw(our.specs())
    rows, labels, scores = data.draw(our.seen_rows(spec))
    binner = Binner(spec, probabilities=spec.classes > 0)
    binner.observe(rows, labels, scores)
    profile = binner.take().check(spec)
    for j, column in enumerate(spec.features):
        start = int(spec.offsets[j])
        found = profile.counts[start : start + column.size].tolist()
        values = [float(x) for x in rows[:, j]]
        bounds = [-np.inf, *column.edges, np.inf]
        wanted = [sum(low < x <= high for x in values if np.isfinite(x)) for low, high in pairwise(bounds)]
        wanted += [sum(np.isnan(x) for x in values), sum(np.isinf(x) for x in values)]
        wanted += [sum(x == y for x, y in pairwise(values))]
        assert found == wanted
    if spec.classes:
        assert profile.counts[-spec.classes :].tolist() == [(labels == k).sum() for k in range(spec.classes)]


@given(st.data())
def test_profiles_of_different_layouts_never_merge(data):
    first, second = data.draw(our.specs()), data.draw(our.specs())
    a, b = data.draw(our.profiles(first)), data.draw(our.profiles(second))
    if first.layout == second.layout:
        assert first == second
        assert a.merge(b).rows == a.rows + b.rows
    else:
        with pytest.raises(ContractError, match="cannot be merged"):
            a.merge(b)


@given(st.data())
def test_a_profile_that_does_not_add_up_is_refused(data):
    spec = data.draw(our.specs(classes=st.integers(1, 3)))
    profile = data.draw(our.profiles(spec))
    at = data.draw(st.integers(0, spec.size - 1))
    counts = profile.counts.copy()
    counts[at] = data.draw(st.integers(profile.rows + 1, 2**63 - 1))
    lying = Profile(layout=profile.layout, rows=profile.rows, counts=counts, sums=profile.sums)
    with pytest.raises(ContractError):
        lying.check(spec)


# ── latency ────────────────────────────────────────────────────────────────────────────────────────────


@given(our.durations, our.durations, our.durations)
def test_latencies_merge_exactly(a, b, c):
    x, y, z = observe_ns(a), observe_ns(b), observe_ns(c)
    assert x.merge(y) == y.merge(x) == observe_ns(np.concatenate([a, b]))
    assert x.merge(y).merge(z) == x.merge(y.merge(z))
    assert x.merge(LatencyHistogram()) == x
    assert x.count == a.size


@given(our.durations.filter(lambda found: found.size > 0), st.floats(0, 1))
def test_a_quantile_is_within_the_stated_error(durations, q):
    exact = np.sort(np.maximum(durations, 0))[min(durations.size - 1, int(q * durations.size))]
    found = observe_ns(durations).quantile_ns(q)
    assert abs(found - exact) <= relative_error() * exact * (1 + 1e-9)


# ── the codec ──────────────────────────────────────────────────────────────────────────────────────────


@given(our.any_message)
def test_what_is_encoded_is_decoded(message):
    data = encode(message)
    assert decode(data) == message
    assert encode(decode(data)) == data


@given(our.any_message, st.integers(0, 255), st.dictionaries(st.text(max_size=5), our.plain(), max_size=2))
def test_a_newer_minor_is_read_and_its_new_fields_ignored(message, minor, extra):
    envelope = msgpack.unpackb(encode(message))
    envelope[1] = minor
    if isinstance(envelope[6], list):
        envelope[6] += extra.values()
    else:
        envelope[6] = {**{f"new-{name}": value for name, value in extra.items()}, **envelope[6]}
    assert decode(msgpack.packb([*envelope, "beyond the envelope"])) == message


def assert_total(data: bytes) -> None:
    try:
        found = decode(data)
    except ContractError:
        return
    assert isinstance(found, Message)
    assert decode(encode(found)) == found


@given(st.binary(max_size=300))
@example(b"")
@example(b"\xc1")
def test_any_bytes_are_a_message_or_refused(data):
    assert_total(data)


@given(our.damaged(our.any_message.map(encode)))
def test_a_damaged_message_is_a_message_or_refused(data):
    assert_total(data)


@given(st.integers(0, 9), our.plain())
def test_any_body_is_a_message_or_refused(kind, body):
    assert_total(msgpack.packb([1, 0, kind, "dev", "0" * 16, 3, body]))


@given(st.data())
def test_a_message_with_one_wrong_field_is_a_message_or_refused(data):
    envelope = msgpack.unpackb(encode(data.draw(our.any_message)))
    assert_total(msgpack.packb(data.draw(our.replaced(envelope, our.plain()))))


def nested(opening: bytes, depth: int) -> bytes:
    return opening * depth + b"\xc0"


BOMBS = {
    "empty maps": b"\xdc\x10\x00" + (b"\xdc\x10\x00" + b"\x80" * 4096) * 62,
    "deep arrays": nested(b"\x91", MAX_MESSAGE_BYTES - 1),
    "deep maps": nested(b"\x81\xa0", MAX_MESSAGE_BYTES // 2 - 1),
    "array that claims 2^32 items": b"\xdd\xff\xff\xff\xff",
    "map that claims 2^32 items": b"\xdf\xff\xff\xff\xff",
    "text that claims 4 GB": b"\xdb\xff\xff\xff\xff",
    "bytes that claim 4 GB": b"\xc6\xff\xff\xff\xff",
    "extension": b"\xc7\x04\x05abcd",
    "timestamp": b"\xd6\xff\x00\x00\x00\x01",
    "too large": b"\xc6\x00\x04\x00\x00" + bytes(MAX_MESSAGE_BYTES),
}


@pytest.mark.parametrize("bomb", BOMBS)
@pytest.mark.parametrize("wrapped", [False, True], ids=["bare", "as a body"])
def test_a_bomb_is_refused_in_bounded_memory(bomb, wrapped):
    data = BOMBS[bomb]
    if wrapped:
        data = (b"\x97\x01\x00\x02\xa3dev\xb0" + b"0" * 16 + b"\x03" + data)[:MAX_MESSAGE_BYTES]
    tracemalloc.start()
    try:
        with pytest.raises(ContractError):
            decode(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 80 * MAX_MESSAGE_BYTES


@given(st.lists(our.counts, max_size=50))
def test_counts_are_packed_and_unpacked(values):
    counts = np.array(values, np.int64)
    found = unpack_counts(pack_counts(counts))
    assert found.dtype == np.int64
    assert found.tolist() == values


def in_step(columns: int, period: int, seed: int, tail: int) -> np.ndarray:
    """Counters as a profile has them: places with their own size, columns that scatter around it."""
    rng = np.random.default_rng(seed)
    sizes = rng.choice([0.0, 0.1, 3.0, 60.0, 900.0], size=period)
    table = rng.poisson(np.tile(sizes, (columns, 1)))
    if period > 2 and seed % 2:  # columns that add up, but for the last place
        table[:, 0] += table[:, :-1].sum(axis=1).max() - table[:, :-1].sum(axis=1)
    return np.concatenate([table.reshape(-1), rng.poisson(500, size=tail)]).astype(np.int64)


tables_in_step = st.builds(
    in_step, st.integers(1, 40), st.integers(1, 40), st.integers(0, 2**32 - 1), st.integers(0, 9)
)


@given(tables_in_step)
def test_counters_in_step_are_packed_and_unpacked(counts):
    packed = pack_counts(counts)
    assert unpack_counts(packed).tolist() == counts.tolist()
    assert len(packed) <= len(pack_planes(counts))


def as_documented(data: bytes) -> list[int]:
    """Scheme 9 read by its documentation alone, a number at a time: what a reader in another language would do."""
    at = 1

    def leb128() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    count, period, columns, implied, total = (leb128() for _ in range(5))
    widths = [data[at + i // 2] >> (0 if i % 2 else 4) & 15 for i in range(period + 2)]
    bits = "".join(f"{byte:08b}" for byte in data[at + (period + 3) // 2 :])
    tail = count - columns * period
    each = [widths[0]] * period + [w for w in widths[1:-1] for _ in range(columns)] + [widths[-1]] * tail
    position, rests = 0, []
    for width in each:
        end = bits.index("1", position) if width else position
        rests.append(end - position)
        position = end + 1 if width else position
    numbers = []
    for width, rest in zip(each, rests, strict=True):
        low = max(0, width - 1)
        folded = (rest << low) + int(bits[position : position + low] or "0", 2)
        position += low
        numbers.append(-(folded + 1) // 2 if folded % 2 else folded // 2)
    assert "1" not in bits[position:]
    assert len(bits) - position < 8
    found = [0] * count
    base = before = 0
    for place in range(period):
        base += numbers[place]
        for column in range(columns):
            found[column * period + place] = base + numbers[period + place * columns + column]
    if implied:
        for start in range(0, columns * period, period):
            others = sum(found[start : start + period - 1]) - found[start + implied - 1]
            found[start + implied - 1] = total - others
    for i in range(columns * period, count):
        before += numbers[period + i]
        found[i] = before
    return found


@given(tables_in_step.map(pack_counts).filter(lambda packed: packed[0] == IN_STEP))
def test_the_documented_scheme_is_what_is_written(packed):
    assert unpack_counts(packed).tolist() == as_documented(packed)


@given(
    our.damaged(tables_in_step.map(pack_counts)) | st.binary(max_size=200).map(lambda rest: b"\x09" + rest)
)
def test_any_bytes_are_counters_in_step_or_refused(data):
    try:
        found = unpack_counts(data, max_counters=2000)
    except ContractError:
        return
    assert found.size <= 2000
    assert not found.size or found.min() >= 0


@given(
    st.binary(max_size=60)
    | our.damaged(
        st.lists(our.counts, max_size=20).map(np.array).map(lambda found: pack_counts(found.astype(np.int64)))
    )
)
def test_any_bytes_are_counts_or_refused(data):
    try:
        found = unpack_counts(data, max_counters=64)
    except ContractError:
        return
    assert found.size <= 64
    assert not found.size or found.min() >= 0


@pytest.mark.parametrize("planes", [1, 8])
def test_packed_counts_never_inflate_beyond_the_cap(planes):
    packer = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    bomb = bytes([planes]) + packer.compress(bytes(64 << 20)) + packer.flush()
    assert len(bomb) < MAX_MESSAGE_BYTES
    tracemalloc.start()
    try:
        with pytest.raises(ContractError, match="at most 1000 counters"):
            unpack_counts(bomb, max_counters=1000)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 4 * len(bomb) + 16 * 1000 * planes
    with pytest.raises(ContractError, match=f"at most {MAX_COUNTERS} counters"):
        unpack_counts(bomb)


# ── releases ───────────────────────────────────────────────────────────────────────────────────────────


@given(our.releases)
def test_a_release_survives_its_payload(found):
    payload = release.to_payload(found)
    assert release.from_payload(payload) == found
    assert release.to_payload(release.from_payload(payload)) == payload


@given(our.damaged(our.releases.map(release.to_payload)) | st.binary(max_size=50))
def test_any_payload_is_a_release_or_refused(payload):
    try:
        found = release.from_payload(payload)
    except ContractError:
        return
    assert release.from_payload(release.to_payload(found)) == found


json_values = our.plain().filter(lambda x: not isinstance(x, bytes)) | st.sampled_from([10**400, "\ud800"])


@given(st.data())
def test_a_payload_with_one_wrong_field_is_a_release_or_refused(data):
    document = json.loads(release.to_payload(data.draw(our.releases)))
    changed = data.draw(our.replaced(document, json_values))
    try:
        payload = json.dumps(changed).encode()
    except (TypeError, ValueError):  # bytes inside
        return
    try:
        found = release.from_payload(payload)
    except ContractError:
        return
    assert release.from_payload(release.to_payload(found)) == found


@given(st.sets(our.devices, min_size=1, max_size=30), our.rollouts, st.data())
def test_the_kth_smallest_hash_takes_exactly_k_devices(fleet, rollout, data):
    k = data.draw(st.integers(0, len(fleet)))
    hashes = sorted(release.stage_hash(device, rollout) for device in fleet)
    threshold = hashes[k] if k < len(fleet) else release.EVERYONE
    found = release.Release(
        fleet=ids.fleet_id("f"),
        cohort=ids.cohort_id("c"),
        model=ids.model_name("m"),
        rollout=rollout,
        revision=1,
        threshold=threshold,
        candidate=our.some_digest(1),
        incumbent=our.some_digest(2),
    )
    chosen = {device for device in fleet if release.desired(found, device) == found.candidate}
    assert len(chosen) == k
    assert all(release.desired(found, device) == found.incumbent for device in fleet - chosen)


# ── names and topics ───────────────────────────────────────────────────────────────────────────────────


@given(st.text(max_size=70))
@example("dev\n")
@example("+")
@example("a" * 65)
def test_a_name_is_safe_in_a_topic_a_path_and_a_line(text):
    try:
        name = ids.device_id(text)
    except ContractError:
        return
    assert name == text
    assert 1 <= len(name) <= 64
    assert set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")


def matches(pattern: str, topic: str) -> bool:
    """MQTT's rule for filters without ``#``."""
    parts, levels = pattern.split("/"), topic.split("/")
    return len(parts) == len(levels) and all(
        p in ("+", level) for p, level in zip(parts, levels, strict=True)
    )


@given(our.fleets, our.devices, our.models)
def test_a_topic_names_its_sender_and_matches_one_family(fleet, device, model):
    topics = Topics(fleet)
    sent = {
        "status": topics.status(device),
        "event": topics.event(device),
        "window": topics.window(device, model),
    }
    for what, topic in sent.items():
        assert topics.sender(topic) == (device, what)
        assert [w for w in sent if matches(topics.every(w), topic)] == [what]


@given(our.fleets, our.fleets, our.devices, our.models, our.cohorts, our.digests, st.integers(0, 200))
def test_topics_of_others_have_no_sender_here(fleet, other, device, model, cohort, digest, i):
    here, there = Topics(fleet), Topics(other)
    foreign = [
        here.ack(device),
        here.command(device),
        here.release(cohort, model),
        here.trust(i),
        here.packed_trust(i),
        here.chunk(digest, i),
        *([there.status(device), there.window(device, model)] if other != fleet else []),
    ]
    for topic in foreign:
        with pytest.raises(ContractError, match="not one a device"):
            here.sender(topic)


@given(our.fleets, st.text(max_size=60))
def test_any_topic_has_a_sender_or_is_refused(fleet, text):
    topics = Topics(fleet)
    for topic in (text, f"skiff/1/{fleet}/d/{text}"):
        try:
            device, what = topics.sender(topic)
        except ContractError:
            continue
        assert topic.startswith(f"skiff/1/{fleet}/d/{device}/")
        assert topic.endswith(f"/{what}")


# ── artifacts ──────────────────────────────────────────────────────────────────────────────────────────

TINY = classifier(("a", "b"), (0, 1))
INFO = read_info(TINY.artifact)


def assert_info_or_refusal(model: bytes) -> None:
    try:
        found = read_info(model)
    except ArtifactError:
        return
    assert isinstance(found, ArtifactInfo)
    assert len(found.manifest.features) == len(found.reference.spec.features)
    assert found.golden.rows.shape[1] == len(found.manifest.features)


@given(our.damaged(st.just(TINY.artifact)) | st.binary(max_size=200))
def test_a_damaged_artifact_is_read_or_refused(model):
    assert_info_or_refusal(model)


@given(st.data())
def test_an_artifact_with_one_wrong_field_is_read_or_refused(data):
    key = data.draw(st.sampled_from(KEYS))
    changed = data.draw(our.replaced(json.loads(TINY.metadata[key]), json_values))
    try:
        text = json.dumps(changed)
    except TypeError:  # bytes inside
        return
    graph = onnx.ModelProto()
    graph.CopyFrom(TINY.graph())
    assert_info_or_refusal(sealed(graph, {**TINY.metadata, key: text}))


@given(st.integers(0, len(TINY.artifact) - 1))
def test_an_artifact_that_was_cut_short_is_refused(length):
    # The metadata comes last in the file, so nothing shorter than the whole can hold all of it.
    with pytest.raises(ArtifactError):
        read_info(TINY.artifact[:length])

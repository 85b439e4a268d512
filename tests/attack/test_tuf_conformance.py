"""The trust store against the published scenarios of the TUF client conformance suite.

The scenarios are those of https://github.com/theupdateframework/tuf-conformance (Apache-2.0 or MIT); what a client has
to do in each is theirs, the code is ours: that suite drives a command line over HTTP, a device gets the same files
another way. `SCENARIOS` names each of them, and the test below that plays it, or why a device cannot meet it.
"""

import json
import re
from datetime import timedelta

import pytest
from securesystemslib.signer import CryptoSigner
from tuf.api.metadata import Metadata, MetaFile

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.ids import Digest, ModelName
from tests.support.tuf_repository import TufClient, TufRepository, set_clock

NO_DOWNLOAD = "TUF's own download of targets is not used: "
SCENARIOS = {
    "test_basic": {
        "test_basic_init_and_refresh": "test_a_first_refresh_asks_for_each_role_once",
        "test_basic_refresh_requests": "test_a_first_refresh_asks_for_each_role_once",
        "test_basic_refresh_trusted_data": "test_files_are_kept_byte_for_byte",
        "test_implicit_refresh": "test_a_model_nobody_vouches_for_is_not_found",
        "test_invalid_initial_root": "test_a_pinned_root_that_is_damaged_asks_for_nothing",
        "test_unsigned_initial_root": "test_a_pinned_root_that_is_damaged_asks_for_nothing",
        "test_unsigned_metadata": "test_a_role_below_its_threshold_is_refused_and_those_before_it_count",
        "test_url_and_metadata_version_mismatch": "test_a_file_under_the_name_of_another_version_is_refused",
        "test_new_targets_version_mismatch": "test_targets_that_no_snapshot_lists_are_not_asked_for",
        "test_timestamp_content_changes": "test_another_timestamp_of_the_same_version_is_not_taken",
        "test_timestamp_eq_versions_check": "test_another_timestamp_of_the_same_version_is_not_taken",
        "test_basic_metadata_hash_support": "test_a_hash_that_is_listed_is_checked",
        "test_new_targets_hash_mismatch": "test_a_hash_that_is_listed_is_checked",
        "test_metadata_bytes_match": "test_files_are_kept_byte_for_byte",
        "test_custom_fields": "test_fields_that_nobody_knows_are_signed_too",
        "test_deprecated_keyid_hash_algorithms": "test_fields_that_nobody_knows_are_signed_too",
        "test_snapshot_404": "test_a_file_that_is_missing_is_a_refusal",
        "test_targets_404": "test_a_file_that_is_missing_is_a_refusal",
        "test_timestamp_404": "test_a_file_that_is_missing_is_a_refusal",
        "test_incorrect_metadata_type": "test_a_snapshot_signed_by_the_timestamp_key_is_no_timestamp",
        "test_faketime": "test_a_root_that_expired_here_is_replaced",
    },
    "test_expiration": {
        "test_root_expired": "test_an_expired_root_is_kept_and_nothing_after_it",
        "test_timestamp_expired": "test_an_expired_role_is_refused",
        "test_snapshot_expired": "test_an_expired_role_is_refused",
        "test_targets_expired": "test_an_expired_role_is_refused",
        "test_expired_metadata": "test_metadata_that_expired_here_is_replaced",
        "test_expired_local_root": "test_a_root_that_expired_here_is_replaced",
        "test_expired_local_timestamp": "test_metadata_that_expired_here_is_replaced",
    },
    "test_delegated_expiration": {
        "test_delegated_targets_expired": "test_a_delegated_role_that_expired_vouches_for_nothing",
        "test_expired_local_delegated_targets": "test_a_delegated_role_that_expired_vouches_for_nothing",
        "test_expired_local_delegated_targets_updates": "test_a_delegated_role_that_expired_here_is_replaced",
    },
    "test_file_download": {
        "test_client_downloads_expected_file": NO_DOWNLOAD
        + "tests/unit/test_updater.py::test_a_model_is_fetched_verified_and_probed",
        "test_client_downloads_expected_file_in_sub_dir": NO_DOWNLOAD
        + "tests/unit/test_updater.py::test_a_model_is_fetched_verified_and_probed",
        "test_repository_substitutes_target_file": NO_DOWNLOAD
        + "tests/attack/test_attacks_on_models.py::test_an_arbitrary_file_in_the_place_of_a_model",
        "test_multiple_changes_to_target": "test_a_path_that_names_other_contents_is_not_found",
    },
    "test_keys": {
        "test_root_has_keys_but_not_snapshot": "test_keys_that_did_not_sign_do_not_count",
        "test_snapshot_does_not_meet_threshold": "test_keys_that_did_not_sign_do_not_count",
        "test_snapshot_has_too_few_keys": "test_a_threshold_above_the_number_of_keys_is_never_met",
        "test_snapshot_threshold": "test_a_threshold_above_the_number_of_keys_is_never_met",
        "test_wrong_hashing_algorithm": "test_fields_that_nobody_knows_are_signed_too",
        "test_duplicate_keys": "test_one_key_counts_once",
        "test_duplicate_keys_root": "test_one_key_counts_once",
        "test_duplicate_sig_keyids": "test_two_signatures_of_one_key_are_refused",
        "test_keytype_and_scheme": "test_every_key_type_of_the_specification_is_verified",
        "test_invalid_sig_in_valid_metadata": "test_a_bad_signature_beside_enough_good_ones_does_no_harm",
    },
    "test_quoting_issues": {"test_unusual_role_name": "test_the_name_of_a_role_is_no_path"},
    "test_rollback": {
        "test_simple_snapshot_rollback": "test_a_snapshot_that_is_known_is_not_asked_for_again",
        "test_new_timestamp_version_rollback": "test_a_timestamp_that_went_back_is_refused",
        "test_snapshot_rollback": "test_a_snapshot_that_went_back_is_refused",
        "test_targets_rollback": "test_targets_that_went_back_are_refused",
        "test_new_snapshot_version_mismatch": "test_a_file_under_the_name_of_another_version_is_refused",
        "test_new_timestamp_fast_forward_recovery": "test_new_keys_recover_from_a_version_that_ran_ahead",
        "test_new_snapshot_fast_forward_recovery": "test_new_keys_recover_from_a_version_that_ran_ahead",
        "test_new_targets_fast_forward_recovery": "test_new_keys_recover_from_a_version_that_ran_ahead",
    },
    "test_static_repositories": {
        "test_static_repo": "repositories of other tools, frozen in time: their timestamps lack the field "
        "``skiff.signed`` that a device asks for, so it refuses them by design; their keys (ECDSA) are verified in "
        "tests/attack/test_tuf_conformance.py::test_every_key_type_of_the_specification_is_verified",
    },
    "test_updater_delegation_graphs": {
        "test_graph_traversal": "test_delegations_are_walked_in_order",
        "test_targetfile_search": "test_a_model_is_looked_for_only_where_everybody_delegated_its_path",
        "test_cached_role_is_verified_against_current_delegator": "test_a_role_counts_for_whoever_named_its_keys",
    },
    "test_updater_key_rotations": {
        "test_root_rotation": "test_roots_follow_one_another_by_threshold",
        "test_non_root_rotations": "test_other_roles_follow_the_keys_in_the_root",
    },
}

MODEL = "toy"
OTHER = Digest("d" * 64)


@pytest.fixture
def repo():
    return TufRepository()


@pytest.fixture
def client(tmp_path, repo):
    return TufClient(tmp_path / "trust", repo)


def refused(client, words):
    with pytest.raises(ContractError, match=words):
        client.refresh()


def test_every_scenario_is_played_or_says_why_not(request):
    folder = request.config.rootpath
    for scenarios in SCENARIOS.values():
        for scenario, where in scenarios.items():
            if where in globals():
                continue
            named = re.findall(r"(tests/\S+\.py)::(\w+)", where)
            assert named, f"{scenario}: {where} is neither a test here nor a reason that names one"
            for path, test in named:
                assert f"def {test}(" in (folder / path).read_text(), f"{scenario}: {path} has no {test}"
    played = {where for scenarios in SCENARIOS.values() for where in scenarios.values()}
    here = {name for name in globals() if name.startswith("test_")}
    assert here - played == {"test_every_scenario_is_played_or_says_why_not"}


# ── basic ──────────────────────────────────────────────────────────────────────────────────────────────

FIRST = ["2.root.json", "timestamp.json", "1.snapshot.json", "1.targets.json"]
ONES = {"root": 1, "timestamp": 1, "snapshot": 1, "targets": 1}


def test_a_first_refresh_asks_for_each_role_once(client):
    client.refresh()
    assert client.asked == FIRST
    assert client.trusted == ONES


def test_a_model_nobody_vouches_for_is_not_found(client):
    assert client.find(MODEL, OTHER) is None
    assert client.asked == FIRST
    assert client.trusted == ONES


def test_a_pinned_root_that_is_damaged_asks_for_nothing(client):
    document = json.loads(client.pinned)
    signature = document["signatures"][0]
    client.pinned = json.dumps({**document, "signatures": [{**signature, "sig": "ab" * 64}]}).encode()
    refused(client, "was signed by 0/1 keys")
    assert client.asked == []
    del document["signed"]["version"]
    client.pinned = json.dumps(document).encode()
    refused(client, "the pinned root is no TUF root")
    assert client.asked == []


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("root", {"root": 1}),
        ("timestamp", {"root": 2}),
        ("snapshot", {"root": 2, "timestamp": 2}),
        ("targets", {"root": 2, "timestamp": 2, "snapshot": 2}),
    ],
)
def test_a_role_below_its_threshold_is_refused_and_those_before_it_count(repo, client, role, trusted):
    repo.signers[role].clear()
    repo.publish("root", "targets", "snapshot", "timestamp")
    refused(client, f"{role} was signed by 0/1 keys")
    assert client.trusted == trusted


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("root", {"root": 1}),
        ("snapshot", {"root": 2, "timestamp": 2}),
        ("targets", {"root": 2, "timestamp": 2, "snapshot": 2}),
    ],
)
def test_a_file_under_the_name_of_another_version_is_refused(repo, client, role, trusted):
    for each in ("root", "targets", "snapshot", "timestamp"):
        if each == role:
            repo.roles[role].version = 3
            repo.offer(role, version=2)
        else:
            repo.publish(each)
    refused(client, "older than what this device has verified before, or mixed")
    assert client.trusted == trusted


def test_targets_that_no_snapshot_lists_are_not_asked_for(repo, client):
    client.refresh()
    repo.publish("targets")
    client.refresh()
    assert client.asked == ["2.root.json", "timestamp.json"]
    assert client.trusted["targets"] == 1


def test_another_timestamp_of_the_same_version_is_not_taken(repo, client):
    client.refresh()
    repo.timestamp.snapshot_meta.version = 100
    repo.offer("timestamp")
    client.refresh()
    assert client.asked[-1] == "timestamp.json"
    assert json.loads(client.files["timestamp.json"])["signed"]["meta"]["snapshot.json"]["version"] == 1


def test_a_hash_that_is_listed_is_checked(repo, client):
    repo.hashes = True
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    repo.publish("targets")
    repo.snapshot.meta["targets.json"] = MetaFile(3, hashes={"sha256": "4" * 64})
    repo.publish("snapshot", "timestamp")
    refused(client, "hash")
    assert (client.trusted["snapshot"], client.trusted["targets"]) == (3, 2)


def test_files_are_kept_byte_for_byte(repo, client):
    repo.files["timestamp.json"] += b" \r\n"
    client.refresh()
    for name, role in (
        ("timestamp.json", "timestamp"),
        ("1.snapshot.json", "snapshot"),
        ("1.targets.json", "targets"),
    ):
        assert client.files[f"{role}.json"].encode() == repo.files[name]
    assert client.files["root_history/1.root.json"].encode() == repo.pinned_root


def test_fields_that_nobody_knows_are_signed_too(repo, client):
    client.refresh()
    repo.root.unrecognized_fields["custom-field"] = "value"
    repo.root.roles["root"].unrecognized_fields["another-field"] = "value"
    key = repo.root.keys[repo.root.roles["snapshot"].keyids[0]]
    key.unrecognized_fields["keyid_hash_algorithms"] = ["md5"]
    key.unrecognized_fields["extra-field"] = {"a": 1}
    repo.publish("root", "snapshot", "timestamp")
    client.refresh()
    assert (client.trusted["root"], client.trusted["snapshot"]) == (2, 2)
    repo.publish("root")
    changed = repo.files["3.root.json"].replace(b'"custom-field":"value"', b'"custom-field":"other"')
    assert changed != repo.files["3.root.json"]
    repo.files["3.root.json"] = changed
    refused(client, "root was signed by 0/1 keys")


@pytest.mark.parametrize(
    ("missing", "trusted"),
    [
        ("timestamp", ONES),
        ("snapshot", {**ONES, "timestamp": 2}),
        ("targets", {**ONES, "timestamp": 2, "snapshot": 2}),
    ],
)
def test_a_file_that_is_missing_is_a_refusal(repo, client, missing, trusted):
    client.refresh()
    repo.publish("targets", "snapshot", "timestamp")
    name = "timestamp.json" if missing == "timestamp" else f"2.{missing}.json"
    del repo.files[name]
    refused(client, re.escape(name))
    assert client.asked[-1] == name
    assert client.trusted == trusted


def test_a_snapshot_signed_by_the_timestamp_key_is_no_timestamp(repo, client):
    repo.add_key("snapshot", repo.signers["timestamp"][0])
    repo.snapshot.meta = {"snapshot.json": MetaFile(1)}
    repo.publish("root")
    repo.snapshot.version = 2
    repo.files["timestamp.json"] = repo.signed("snapshot")
    refused(client, "[Ee]xpected 'timestamp'")
    assert client.trusted == {"root": 2}


# ── expiration ─────────────────────────────────────────────────────────────────────────────────────────


def test_an_expired_root_is_kept_and_nothing_after_it(repo, client):
    client.refresh()
    repo.root.expires = repo.now - timedelta(days=1)
    repo.publish("root", "targets", "snapshot", "timestamp")
    refused(client, "root.json is expired")
    assert client.trusted == {**ONES, "root": 2}


@pytest.mark.parametrize(
    ("role", "trusted"),
    [
        ("timestamp", ONES),
        ("snapshot", {**ONES, "timestamp": 2}),
        ("targets", {**ONES, "timestamp": 2, "snapshot": 2}),
    ],
)
def test_an_expired_role_is_refused(repo, client, role, trusted):
    client.refresh()
    repo.roles[role].expires = repo.now - timedelta(days=5)
    repo.publish("targets", "snapshot", "timestamp")
    refused(client, "is expired by this device's clock")
    assert client.trusted == trusted


def later(monkeypatch, repo, days):
    set_clock(monkeypatch, repo.now + timedelta(days=days))


def test_metadata_that_expired_here_is_replaced(repo, client, monkeypatch):
    repo.timestamp.expires = repo.now + timedelta(days=7)
    repo.publish("timestamp")
    client.refresh()
    repo.timestamp.expires = repo.now + timedelta(days=21)
    repo.publish("targets", "snapshot", "timestamp")
    later(monkeypatch, repo, 18)
    client.refresh()
    assert client.trusted == {"root": 1, "timestamp": 3, "snapshot": 2, "targets": 2}


def test_a_root_that_expired_here_is_replaced(repo, client, monkeypatch):
    repo.root.expires = repo.now + timedelta(days=7)
    repo.publish("root")
    client.refresh()
    repo.root.expires = repo.now + timedelta(days=21)
    repo.publish("root")
    later(monkeypatch, repo, 18)
    client.refresh()
    assert client.trusted["root"] == 3
    later(monkeypatch, repo, 22)
    refused(client, "root.json is expired")


def delegate(repo, name, model, *, life):
    repo.delegate("targets", name, f"models/{model}/*", life=life)
    digest = repo.add_model(name, model, b"delegated")
    repo.publish(name, "targets", "snapshot", "timestamp")
    return digest


def test_a_delegated_role_that_expired_vouches_for_nothing(repo, client, monkeypatch):
    fresh = delegate(repo, "fresh", "toy", life=timedelta(days=7))
    stale = delegate(repo, "stale", "old", life=timedelta(days=-1))
    assert client.find("toy", fresh) == len(b"delegated")
    with pytest.raises(ContractError, match="New stale is expired"):
        client.find("old", stale)
    assert "stale" not in client.trusted
    later(monkeypatch, repo, 18)
    with pytest.raises(ContractError, match="New fresh is expired"):
        client.find("toy", fresh)


def test_a_delegated_role_that_expired_here_is_replaced(repo, client, monkeypatch):
    digest = delegate(repo, "fresh", "toy", life=timedelta(days=7))
    assert client.find("toy", digest)
    repo.delegated["fresh"].expires = repo.now + timedelta(days=21)
    repo.publish("fresh", "snapshot", "timestamp")
    later(monkeypatch, repo, 18)
    assert client.find("toy", digest)
    assert client.trusted["fresh"] == 2


# ── targets ────────────────────────────────────────────────────────────────────────────────────────────


def test_a_path_that_names_other_contents_is_not_found(repo, client):
    digest = repo.add_model("targets", MODEL, b"first")
    for k in range(3):
        repo.add_model("targets", MODEL, b"first")
        repo.publish("targets", "snapshot", "timestamp")
        assert client.find(MODEL, digest) == len(b"first")
        repo.add_model("targets", MODEL, f"malicious {k}".encode(), digest=digest)
        repo.publish("targets", "snapshot", "timestamp")
        assert client.find(MODEL, digest) is None


# ── keys ───────────────────────────────────────────────────────────────────────────────────────────────


def test_keys_that_did_not_sign_do_not_count(repo, client):
    repo.root.roles["snapshot"].threshold = 3
    repo.add_key("snapshot")
    repo.add_key("snapshot")
    repo.publish("root", "snapshot", "timestamp")
    client.refresh()
    repo.signers["snapshot"].pop()
    repo.publish("snapshot", "timestamp")
    refused(client, "snapshot was signed by 2/3 keys")
    assert (client.trusted["root"], client.trusted["snapshot"]) == (2, 2)


def test_a_threshold_above_the_number_of_keys_is_never_met(repo, client):
    client.refresh()
    for _ in range(4):
        repo.add_key("snapshot")
    repo.root.roles["snapshot"].threshold = 6
    repo.publish("root", "snapshot", "timestamp")
    refused(client, "snapshot was signed by 5/6 keys")
    assert (client.trusted["root"], client.trusted["snapshot"]) == (2, 1)


@pytest.mark.parametrize("listed", [1, 3])
def test_one_key_counts_once(repo, client, listed):
    """However often the root lists it, and however often its signature stands there."""
    client.refresh()
    role = repo.root.roles["snapshot"]
    role.keyids *= listed
    role.threshold = 3
    repo.publish("root", "snapshot", "timestamp")
    document = json.loads(repo.files["2.snapshot.json"])
    document["signatures"] *= 3
    repo.files["2.snapshot.json"] = json.dumps(document).encode()
    refused(client, "deserialize")
    assert client.trusted["snapshot"] == 1
    assert client.trusted["root"] == (2 if listed == 1 else 1)


def test_two_signatures_of_one_key_are_refused(repo, client):
    document = json.loads(repo.files["1.snapshot.json"])
    document["signatures"] *= 2
    repo.files["1.snapshot.json"] = json.dumps(document).encode()
    refused(client, "[Mm]ultiple signatures|deserialize")
    assert "snapshot" not in client.trusted


MAKERS = {
    "rsa": (CryptoSigner.generate_rsa, "ab" * 384),
    "ecdsa": (CryptoSigner.generate_ecdsa, "3045" + "0220" + "11" * 32 + "0221" + "00" + "ee" * 32),
    "ed25519": (CryptoSigner.generate_ed25519, "b6" * 64),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_every_key_type_of_the_specification_is_verified(repo, client, kind):
    make, looks_right = MAKERS[kind]
    signer = repo.add_key("root", make())
    repo.root.roles["root"].threshold = 2
    repo.publish("root")
    client.refresh()
    assert client.trusted["root"] == 2
    repo.publish("root")
    md = Metadata.from_bytes(repo.files["3.root.json"])
    md.signatures[signer.public_key.keyid].signature = looks_right
    repo.files["3.root.json"] = md.to_bytes()
    refused(client, "root was signed by 1/2 keys")
    assert client.trusted["root"] == 2


def test_a_bad_signature_beside_enough_good_ones_does_no_harm(repo, client):
    first = repo.signers["timestamp"][0]
    repo.add_key("timestamp")
    repo.publish("root", "timestamp")
    for bad in ("ab" * 64, ""):
        repo.publish("timestamp")
        md = Metadata.from_bytes(repo.files["timestamp.json"])
        md.signatures[first.public_key.keyid].signature = bad
        repo.files["timestamp.json"] = md.to_bytes()
        client.refresh()
        assert client.trusted["timestamp"] == repo.timestamp.version


@pytest.mark.parametrize("name", ["?", "#", "/delegatedrole", "../delegatedrole", ".", "..", "a\0b", "a\nb"])
def test_the_name_of_a_role_is_no_path(repo, client, tmp_path, name):
    before = {p for p in tmp_path.rglob("*") if "trust" not in p.parts}
    repo.delegate("targets", name, "models/*/*")
    repo.publish(name, "targets", "snapshot", "timestamp")
    assert client.find(MODEL, OTHER) is None
    assert len(client.trusted) == 5
    assert len(client.asked) == 5
    assert "/" not in client.asked[-1]
    assert {p for p in tmp_path.rglob("*") if "trust" not in p.parts} == before


# ── rollback ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_snapshot_that_is_known_is_not_asked_for_again(repo, client):
    repo.publish("snapshot", "timestamp")
    client.refresh()
    repo.snapshot.version = 1
    repo.offer("snapshot", version=2)
    client.refresh()
    assert client.asked[-1] == "timestamp.json"
    assert client.trusted["snapshot"] == 2


def test_a_timestamp_that_went_back_is_refused(repo, client):
    repo.publish("timestamp")
    client.refresh()
    repo.timestamp.version = 1
    repo.offer("timestamp")
    refused(client, "older than what this device has verified before")
    assert client.trusted["timestamp"] == 2
    assert client.asked[-1] == "timestamp.json"


@pytest.mark.parametrize("hashes", [False, True])
def test_a_snapshot_that_went_back_is_refused(repo, client, hashes):
    repo.hashes = hashes
    repo.publish("snapshot", "timestamp")
    client.refresh()
    repo.snapshot.version = 0
    repo.publish("snapshot", "timestamp")
    refused(client, "older than what this device has verified before")
    assert (client.trusted["timestamp"], client.trusted["snapshot"]) == (2, 2)
    assert client.asked[-1] == "timestamp.json"


@pytest.mark.parametrize("hashes", [False, True])
def test_targets_that_went_back_are_refused(repo, client, hashes):
    repo.hashes = hashes
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    repo.targets.version = 0
    repo.publish("targets", "snapshot", "timestamp")
    refused(client, "older than what this device has verified before")
    assert (client.trusted["snapshot"], client.trusted["targets"]) == (2, 2)


@pytest.mark.parametrize(
    ("ahead", "replaced"),
    [("timestamp", ["timestamp"]), ("snapshot", ["snapshot", "timestamp"]), ("targets", ["snapshot"])],
)
def test_new_keys_recover_from_a_version_that_ran_ahead(repo, client, ahead, replaced):
    repo.roles[ahead].version = 99_999
    repo.publish("targets", "snapshot", "timestamp")
    client.refresh()
    assert client.trusted[ahead] == repo.roles[ahead].version >= 99_999
    repo.roles[ahead].version = 0
    for role in replaced:
        repo.rotate(role)
    repo.publish("root", "targets", "snapshot", "timestamp")
    client.refresh()
    assert client.trusted[ahead] == 1


# ── delegations ────────────────────────────────────────────────────────────────────────────────────────

ANY, NONE = "models/*/*", "models/*/*.py"
GRAPHS = {
    "basic-delegation": ([("targets", "A", ANY)], "A"),
    "single-level-delegations": ([("targets", "A", ANY), ("targets", "B", ANY)], "AB"),
    "two-level-delegations": ([("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY)], "ABC"),
    "two-level-test-DFS-order-of-traversal": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", ANY), ("A", "D", ANY)],
        "ACDB",
    ),
    "three-level-delegation-test-DFS-order-of-traversal": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", ANY), ("C", "D", ANY)],
        "ACDB",
    ),
    "two-level-terminating-ignores-all-but-roles-descendants": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C!", ANY), ("A", "D", ANY)],
        "AC",
    ),
    "three-level-terminating-ignores-all-but-roles-descendants": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C!", ANY), ("C", "D", ANY)],
        "ACD",
    ),
    "two-level-ignores-all-branches-not-matching-paths": (
        [("targets", "A", NONE), ("targets", "B", ANY), ("A", "C", ANY)],
        "B",
    ),
    "three-level-ignores-all-branches-not-matching-paths": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("A", "C", NONE), ("C", "D", ANY)],
        "AB",
    ),
    "cyclic-graph": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("C", "D", ANY), ("D", "B", ANY)],
        "ABCD",
    ),
    "two-roles-delegating-to-a-third": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("A", "C", ANY)],
        "ACB",
    ),
    "two-roles-delegating-to-a-third-different-paths": (
        [("targets", "A", ANY), ("targets", "B", ANY), ("B", "C", ANY), ("A", "C", NONE)],
        "ABC",
    ),
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_delegations_are_walked_in_order(repo, client, graph):
    edges, visited = GRAPHS[graph]
    for delegator, name, paths in edges:
        repo.delegate(delegator, name.rstrip("!"), paths, terminating=name.endswith("!"))
    repo.publish(*repo.delegated, "targets", "snapshot", "timestamp")
    assert client.find(MODEL, OTHER) is None
    asked = client.asked[4:]
    assert len(asked) == len(set(asked))
    assert [name.split(".")[1] for name in asked] == list(visited)


@pytest.mark.parametrize(
    ("role", "model", "found", "visited"),
    [
        ("targets", "plain", True, ""),
        ("A", "read-me", True, "A"),
        ("C", "release-x", True, "BC"),
        ("D", "release-y", True, "BD"),
        ("D", "release-z", False, "B"),
    ],
)
def test_a_model_is_looked_for_only_where_everybody_delegated_its_path(
    repo, client, role, model, found, visited
):
    repo.delegate("targets", "A", "models/read-*/*")
    repo.delegate("targets", "B", "models/release-*/*")
    repo.delegate("B", "C", "models/release-x/*")
    repo.delegate("B", "D", "models/release-y/*")
    digest = repo.add_model(role, model, model.encode())
    repo.publish(*repo.delegated, "targets", "snapshot", "timestamp")
    assert (client.find(model, digest) == len(model)) is found
    assert [name.split(".")[1] for name in client.asked[4:]] == list(visited)


def test_a_role_counts_for_whoever_named_its_keys(repo, client):
    """Role C is verified against A's keys for one model; for another, B delegates to a C with other keys."""
    repo.delegate("targets", "A", "models/alpha/*")
    repo.delegate("targets", "B", "models/beta/*")
    repo.delegate("A", "C", "models/*/*")
    digest = repo.add_model("C", "beta", b"by A's friend")
    repo.delegate("B", "C", "models/*/*")
    by = repo.delegated["B"]
    assert by.delegations is not None
    assert by.delegations.roles is not None
    by.delegations.roles["C"].keyids.clear()
    by.add_key(CryptoSigner.generate_ed25519().public_key, "C")
    repo.publish(*repo.delegated, "targets", "snapshot", "timestamp")

    def both(store):
        assert store.find(ModelName("alpha"), OTHER) is None
        return store.find(ModelName("beta"), digest)

    with pytest.raises(ContractError, match="C was signed by 0/1 keys"):
        client.ask(both)


# ── key rotation ───────────────────────────────────────────────────────────────────────────────────────

# Each version of the root as (its keys, threshold, who signs it); the last is refused where the name says so.
ROOTS = {
    "1-of-1-key-rotation": [("1", 1, "1"), ("2", 1, "21"), ("2", 1, "2")],
    "1-of-1-key-rotation-unused-signatures": [("1", 1, "314"), ("2", 1, "3214"), ("2", 1, "324")],
    "3-of-5-sign-with-different-keycombos": [
        ("01234", 3, "024"),
        ("01234", 3, "041"),
        ("01234", 3, "013"),
        ("01234", 3, "013"),
    ],
    "3-of-5-one-key-rotated": [("01234", 3, "024"), ("01345", 3, "041")],
    "3-of-5-one-key-rotated-with-intermediate-step": [
        ("01234", 3, "024"),
        ("01345", 3, "0245"),
        ("01345", 3, "045"),
    ],
    "3-of-5-all-keys-rotated-with-intermediate-step": [
        ("01234", 3, "024"),
        ("56789", 3, "024567"),
        ("56789", 3, "567"),
    ],
    "1-of-3-threshold-increase-to-2-of-3": [("123", 1, "1"), ("123", 2, "12")],
    "2-of-3-threshold-decrease-to-1-of-3": [("123", 2, "12"), ("123", 1, "12"), ("123", 1, "1")],
    "1-of-2-threshold-increase-to-2-of-2": [("1", 1, "1"), ("12", 2, "12")],
    "1-of-1-key-rotation-fail-not-signed-with-old-key": [("1", 1, "1"), ("2", 1, "234")],
    "1-of-1-key-rotation-fail-not-signed-with-new-key": [("1", 1, "1"), ("2", 1, "134")],
    "3-of-5-one-key-rotate-fails-not-signed-with-3-new-keys": [("01234", 3, "024"), ("01345", 3, "024")],
    "3-of-5-one-key-rotate-fails-not-signed-with-3-old-keys": [("01234", 3, "024"), ("01345", 3, "045")],
    "1-of-3-threshold-bump-to-2-of-3-fails-new-threshold-not-reached": [("123", 1, "1"), ("123", 2, "2")],
    "2-of-3-threshold-decr-to-1-of-3-fails-old-threshold-not-reached": [("123", 2, "12"), ("123", 1, "1")],
}
# Keys, threshold and signatures of a role after its keys were replaced.
OTHERS = {
    "1-of-1-key-rotation": ("2", 1, "2"),
    "1-of-1-key-rotation-unused-signatures": ("1", 1, "314"),
    "1-of-1-key-rotation-fail-not-signed-with-new-key": ("2", 1, "134"),
    "3-of-5-one-key-signature-wrong-fail-not-signed-with-3-expected-keys": ("01345", 3, "024"),
    "2-of-5-one-key-signature-missing-fail-threshold-not-reached": ("01345", 3, "04"),
    "3-of-5-sign-first-combo": ("01234", 3, "024"),
    "3-of-5-sign-second-combo": ("01234", 3, "041"),
    "3-of-5-sign-third-combo": ("01234", 3, "013"),
    "3-of-5-sign-fourth-combo": ("01234", 3, "123"),
    "3-of-5-sign-fifth-combo": ("01234", 3, "234"),
}


@pytest.fixture(scope="module")
def signers():
    return [CryptoSigner.generate_ed25519() for _ in range(10)]


def name_keys(repo, signers, role, keys, threshold, by):
    repo.root.roles[role].keyids.clear()
    repo.root.roles[role].threshold = threshold
    for k in keys:
        repo.root.add_key(signers[int(k)].public_key, role)
    repo.signers[role] = [signers[int(k)] for k in by]


@pytest.mark.parametrize("case", ROOTS)
def test_roots_follow_one_another_by_threshold(repo, tmp_path, signers, case):
    repo.root.version = 0
    for keys, threshold, by in ROOTS[case]:
        name_keys(repo, signers, "root", keys, threshold, by)
        repo.publish("root")
    client = TufClient(tmp_path / "trust", repo)
    if "fail" in case:
        refused(client, "root was signed by")
        assert client.trusted == {"root": len(ROOTS[case]) - 1}
    else:
        client.refresh()
        assert client.trusted["root"] == len(ROOTS[case])


@pytest.mark.parametrize("role", ["timestamp", "snapshot", "targets"])
@pytest.mark.parametrize("case", OTHERS)
def test_other_roles_follow_the_keys_in_the_root(repo, client, signers, case, role):
    client.refresh()
    name_keys(repo, signers, role, *OTHERS[case])
    repo.publish("root", "targets", "snapshot", "timestamp")
    if "fail" in case:
        refused(client, f"{role} was signed by")
        assert client.trusted[role] == 1
    else:
        client.refresh()
        assert client.trusted[role] == 2

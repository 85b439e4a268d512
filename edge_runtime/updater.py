"""The update child: ``python -m edge_runtime.updater``. It verifies a release, fetches a model, and has it tried.

One JSON job on stdin; JSON lines on stdout, the last of them ``{"result": …}``. It lives for seconds, so what TUF and
cryptography weigh is never the daemon's. Nothing is believed before it is verified, nothing is parsed before its
digest is checked, and the model is loaded by yet another process (`edge_runtime.probe`) under hard limits.

What comes is capped, every wait is bounded, and so is the whole job: python-tuf itself has no protection against slow
retrieval. A release that was followed before and asks for nothing is answered from the record: nobody is asked, so
that a fleet which starts again costs its broker no metadata.
"""

import contextlib
import fcntl
import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from functools import cached_property
from typing import Any, Final

from edge_runtime.adapters import disk, sandbox
from edge_runtime.adapters.child import end_with_reader, give_way
from edge_runtime.adapters.slots import Slots
from edge_runtime.carriers import Carrier
from edge_runtime.carriers.https import HttpsCarrier
from edge_runtime.carriers.mqtt import MqttCarrier
from edge_runtime.contract import codec, topics
from edge_runtime.contract.errors import ArtifactError, ContractError, LinkError
from edge_runtime.contract.fields import Fields
from edge_runtime.contract.ids import Digest
from edge_runtime.contract.manifest import manifest_digest
from edge_runtime.contract.messages import SignedRelease
from edge_runtime.contract.release import Release, from_payload
from edge_runtime.contract.trust import Target
from edge_runtime.core.budget import Budget, beside, breaches
from edge_runtime.core.lifecycle import needs
from edge_runtime.fetching import Fetching
from edge_runtime.truststore import TrustStore
from edge_runtime.update_job import Job, Probed, Refusal, read_budget

PROBE_RUNS: Final = 2000
PROBE_CPU_SECONDS: Final = 60
MAX_JOB_BYTES: Final = 4 << 20
_QUIET: Final = ("keep", "skip_quarantined")


class Update:
    """One job, from its first wait to its result."""

    def __init__(self, job: Job) -> None:
        self._job = job
        self._deadline = time.monotonic() + job.deadline_seconds
        self._stage = "trust"
        self._payload = b""

    @cached_property
    def _slots(self) -> Slots:
        return Slots(self._job.state_dir)

    def run(self) -> dict[str, Any]:
        """The result, whatever happened; only a programming error escapes."""
        try:
            with self._alone(), self._alarm():
                return self._run()
        except Refusal as e:
            self._stage = e.stage or self._stage
            return self._failed(str(e), retry=e.retry, digest=e.digest)
        except (LinkError, ContractError) as e:
            return self._failed(str(e), retry=True)
        except OSError as e:
            return self._failed(f"{e}: check the disk and permissions of {self._job.state_dir}", retry=True)

    def _failed(self, reason: str, *, retry: bool, digest: Digest | None = None) -> dict[str, Any]:
        return {
            "ok": False,
            "stage": self._stage,
            "reason": reason,
            "retry": retry,
            "digest": digest or "",
            "release": self._payload.hex(),
        }

    def _run(self) -> dict[str, Any]:
        job = self._job
        message, claimed = self._claimed()
        self._stage = "trust"
        with ExitStack() as stack:
            trusted = stack.enter_context(TrustStore(job.state_dir / "trust", self._pinned_root()))
            if trusted.knows(claimed, message.payload):
                action, digest = self._needs(claimed)
                if action in _QUIET:
                    self._payload = message.payload
                    return self._done(action, digest)
            fetching = Fetching(self._carriers(stack), deadline=self._deadline)
            fetching.refresh(trusted)
            self._stage = "release"
            action, digest = self._needs(self._believe(trusted, message))
            if action in _QUIET or digest is None:
                return self._done(action, digest)
            if trusted.is_revoked(digest):
                raise Refusal(f"model {digest} was revoked: release another one", retry=False, digest=digest)
            if action == "switch":
                return self._done(action, digest)
            target = self._approved(trusted, digest)
            _say({"progress": "fetching", "digest": digest})
            self._stage = "fetch"
            fetching.bring(target, self._slots)
        self._stage = "verify"
        self._check_manifest(target)
        _say({"progress": "verified", "digest": digest})
        self._stage = "probe"
        probed = self._probe(digest)
        _say({"progress": "probed", "digest": digest})
        return self._done(action, digest, probed)

    def _done(self, action: str, digest: Digest | None, probed: Probed | None = None) -> dict[str, Any]:
        return {
            "ok": True,
            "release": self._payload.hex(),
            "desired": digest or "",
            "action": action,
            "probe": asdict(probed) if probed is not None else None,
        }

    # ── bounds ─────────────────────────────────────────────────────────────────────────────────────────

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Two children of one device would undo each other's record."""
        folder = self._job.state_dir / "trust"
        disk.make_folder(folder)
        with (folder / "lock").open("w") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as e:
                raise Refusal("another update of this device is still running", retry=True) from e
            yield

    @contextlib.contextmanager
    def _alarm(self) -> Iterator[None]:
        """The bound of last resort, a second after the deadline: every wait should have ended before."""

        def ring(*_: object) -> None:
            raise Refusal(
                f"the deadline of {self._job.deadline_seconds:g} s passed in stage {self._stage!r}",
                retry=True,
            )

        before = signal.signal(signal.SIGALRM, ring)
        signal.setitimer(signal.ITIMER_REAL, max(0.0, self._left()) + 1.0)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
            signal.signal(signal.SIGALRM, before)

    def _left(self) -> float:
        return self._deadline - time.monotonic()

    # ── network ────────────────────────────────────────────────────────────────────────────────────────

    def _carriers(self, stack: ExitStack) -> list[Carrier]:
        """The ways to the publisher in the order of the device's liking; none is connected before it is used."""
        job = self._job
        mqtt = MqttCarrier(
            job.broker, fleet=job.fleet, device=job.device, max_chunk_bytes=job.max_chunk_bytes
        )
        found: list[Carrier] = [stack.enter_context(mqtt)]
        if job.web is not None:
            at = 0 if job.prefer == topics.HTTPS else 1
            found.insert(at, stack.enter_context(HttpsCarrier(job.web)))
        return found

    # ── trust ──────────────────────────────────────────────────────────────────────────────────────────

    def _pinned_root(self) -> bytes:
        try:
            return self._job.root.read_bytes()
        except OSError as e:
            raise ContractError(
                f"the pinned root {self._job.root} cannot be read ({e.strerror}): provision 1.root.json there"
            ) from e

    def _claimed(self) -> tuple[SignedRelease, Release]:
        """What the job is about. Whoever sent it may have made it up, but it is meant for this device."""
        job = self._job
        self._stage = "release"
        message = codec.decode(job.release)
        if not isinstance(message, SignedRelease):
            raise Refusal(f"a {type(message).__name__} instead of a release", retry=False)
        release = from_payload(message.payload)
        for what, found, own in (
            ("fleet", release.fleet, job.fleet),
            ("cohort", release.cohort, job.cohort),
            ("model", release.model, job.model),
        ):
            if found != own:
                raise Refusal(
                    f"the release is meant for {what} {found!r}, this device has {own!r}", retry=False
                )
        return message, release

    def _believe(self, trusted: TrustStore, message: SignedRelease) -> Release:
        """The release, once its signature is good and it is not an old one."""
        release = trusted.read_release(message)
        try:
            trusted.accept(message, floor=self._job.floor)
        except ContractError as e:
            raise Refusal(str(e), retry=False) from e
        self._payload = message.payload
        return release

    def _needs(self, release: Release) -> tuple[str, Digest | None]:
        job = self._job
        return needs(release, job.device, serving=job.serving, have=job.have, quarantine=job.quarantine)

    def _approved(self, trusted: TrustStore, digest: Digest) -> Target:
        """What is signed of the model, when the publisher vouches for it and it is meant to be this small."""
        self._stage = "trust"
        target = trusted.find(self._job.model, digest)
        self._stage = "release"
        if target is None:
            raise Refusal(
                f"model {digest} is no target of family {self._job.model!r} in the trust metadata: publish it, or "
                "release a published one",
                retry=True,
            )
        declared = target.budgets
        if problems := breaches(
            self._job.budget, predict_p99_ns=declared.predict_p99_ns, rss_bytes=declared.rss_bytes
        ):
            raise Refusal(
                f"model {digest} declares more than this device allows, and was not fetched: {'; '.join(problems)}: "
                "convert it with smaller budgets, or raise those in the device's configuration",
                retry=False,
                digest=digest,
            )
        return target

    def _check_manifest(self, target: Target) -> None:
        """What was signed of the model's manifest is what the model says of itself."""
        if target.manifest is None:
            return
        try:
            found = manifest_digest(self._slots.blob(target.digest).read_bytes())
        except ArtifactError as e:
            raise Refusal(f"model {target.digest}: {e}", retry=False, digest=target.digest) from e
        if found != target.manifest:
            raise Refusal(
                f"model {target.digest}: its manifest has SHA-256 {found}, and {target.manifest} was signed: publish a "
                "new version of it",
                retry=False,
                digest=target.digest,
            )

    # ── probe ──────────────────────────────────────────────────────────────────────────────────────────

    def _probe(self, digest: Digest) -> Probed:
        """Has the model tried in a process of its own, and compares with the budgets."""
        job = self._job
        answer = Fields(self._ask_probe(digest), "probe")
        if not answer.flag("ok"):
            reason, unread = answer.text("reason", max_length=4096), answer.flag("unread", False)
            raise Refusal(reason, retry=unread, digest=digest)
        if answer.text("model") != job.model:
            raise Refusal(
                f"the artifact says it is {answer.text('model')!r}, not {job.model!r}",
                retry=False,
                digest=digest,
            )
        found = Probed.read(answer)
        budget = self._budget(read_budget(answer.section("budgets")), found)
        problems = breaches(budget, predict_p99_ns=found.predict_p99_ns, rss_bytes=found.rss_bytes)
        if 0 < self._job.load_peak_bytes < found.peak_rss_bytes:
            problems.append(
                f"RSS of {found.peak_rss_bytes / 1e6:.1f} MB while it loads is above the "
                f"{self._job.load_peak_bytes / 1e6:.1f} MB of budgets.load_peak_mb"
            )
        if problems:
            compared = f", the serving model's p99 {found.incumbent_p99_ns / 1e3:.1f} us"
            raise Refusal(
                f"{'; '.join(problems)} (median {found.predict_p50_ns / 1e3:.1f} us over {found.runs} rows"
                f"{compared if found.incumbent_p99_ns else ''}): train a smaller model, or raise the budget in the "
                "device's configuration or the artifact",
                retry=False,
                digest=digest,
            )
        return found

    def _budget(self, declared: Budget, found: Probed) -> Budget:
        """The device's and the model's, whichever is stricter, judged as in a trial: beside what serves here."""
        return beside(self._job.budget.tightest(declared), found.incumbent_p99_ns)

    def _ask_probe(self, digest: Digest) -> object:
        """The probe's answer; without the incumbent where a probe with both came to a bad end, for it may have been
        the incumbent's doing.
        """
        serving = self._job.serving
        incumbent = serving if serving is not None and self._slots.has(serving) else None
        ended = self._run_probe(digest, incumbent)
        if ended.code < 0 and incumbent is not None:
            ended = self._run_probe(digest, None)
        try:
            if ended.code == 0:
                return json.loads(ended.answer)
        except ValueError as e:
            raise Refusal(
                f"model {digest}: the probe's answer is garbled ({e})", retry=False, digest=digest
            ) from e
        words = f" ({ended.words})" if ended.words else ""
        # Who is killed from outside, or does not get as far as a verdict, may be short of what the device lacks.
        device = ended.code > 0 or ended.code == -signal.SIGKILL
        raise Refusal(f"model {digest}: the probe {ended.how}{words}", retry=device, digest=digest)

    def _run_probe(self, digest: Digest, incumbent: Digest | None) -> sandbox.Ended:
        task = {
            "model": str(self._slots.blob(digest)),
            "digest": digest,
            "incumbent": str(self._slots.blob(incumbent)) if incumbent is not None else "",
            "incumbent_digest": incumbent or "",
            "address_space_bytes": self._job.probe_address_space_bytes,
            "cpu_seconds": PROBE_CPU_SECONDS,
            "runs": PROBE_RUNS,
        }
        try:
            return sandbox.run("edge_runtime.probe", task, timeout_seconds=self._left())
        except TimeoutError as e:
            raise Refusal(f"model {digest}: the deadline passed during the probe", retry=True) from e
        except OSError as e:
            raise Refusal(f"model {digest}: the probe cannot be started: {e}", retry=True) from e


def _say(line: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def main() -> int:
    """Entry point: 0 with a result on stdout, 2 when the job on stdin is none."""
    end_with_reader()
    give_way()
    try:
        job = Job.read(json.loads(sys.stdin.buffer.read(MAX_JOB_BYTES)))
    except (ValueError, ContractError) as e:
        sys.stderr.write(f"updater: not a job ({e})\n")
        return 2
    _say({"result": Update(job).run()})
    return 0


if __name__ == "__main__":
    sys.exit(main())

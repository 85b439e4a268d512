"""Whether what a model costs lies within what was declared, and what to do when the whole process costs too much.

`Budget` and the functions on it judge a model, before and during its trial. `Limits` and `Guard` watch the process.
"""

import math
from dataclasses import dataclass, replace
from typing import Final

from edge_runtime.contract.errors import ConfigError
from edge_runtime.contract.latency import LatencyHistogram
from edge_runtime.contract.messages import Health

MIN_COMPARED: Final = 20
"""Fewer than the 25 of a trial of 200 rows. Their p99 is the slowest, which allows the candidate rather more."""
COMPARED_FACTOR: Final = 2.0
COLD_FACTOR: Final = 8
CHANCE: Final = 1e-6
"""How likely rows of a model inside its limit may look too slow; small, for a trial is judged again with every row."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """Limits for one model on one device; 0 means no limit."""

    predict_p99_ns: int = 0
    rss_bytes: int = 0

    def tightest(self, other: "Budget") -> "Budget":
        """The stricter limit of each kind."""
        return Budget(
            predict_p99_ns=_stricter(self.predict_p99_ns, other.predict_p99_ns),
            rss_bytes=_stricter(self.rss_bytes, other.rss_bytes),
        )


def _stricter(a: int, b: int) -> int:
    return min(a, b) if a and b else a or b


def on_trial(budget: Budget, incumbent: LatencyHistogram) -> Budget:
    """What a model may spend among everything else that the device does, given what the incumbent spends there.

    The probe holds a model to the budget, `beside` the incumbent, in a quiet loop. Serving, the same model spends
    several times as much: others empty the caches between two rows (on 2 cores with 20 processes a forest's p99 went
    from 15 to 115 us of CPU time). So a trial is held to twice what the incumbent needs for rows in between, or the
    budget where that is more; to `COLD_FACTOR` times the budget, if that is more, while there are few such rows or
    none.
    """
    limit = budget.predict_p99_ns
    if limit and incumbent.count < MIN_COMPARED:
        limit *= COLD_FACTOR
    p99_ns = incumbent.quantile_ns(0.99) if incumbent.count else 0.0
    return beside(replace(budget, predict_p99_ns=limit), p99_ns)


def beside(budget: Budget, incumbent_p99_ns: float) -> Budget:
    """What a model may spend where the one that serves spends ``incumbent_p99_ns`` under the same conditions; 0: none.

    A device that is slower than the budget even with the model it serves does not condemn a good one.
    """
    limit = budget.predict_p99_ns
    if limit:
        limit = max(limit, int(COMPARED_FACTOR * incumbent_p99_ns))
    return replace(budget, predict_p99_ns=limit)


def surest_p99_ns(times: LatencyHistogram) -> float:
    """What the p99 behind ``times`` lies above, wrong with a chance of at most `CHANCE`; NaN below 3 rows.

    The p99 of a few rows is their slowest one, which says more about what else the device did than about the model.
    The k-th slowest of n bounds the p99 from below where k rows in the slowest hundredth would be that unlikely, by
    Hoeffding's bound on a binomial tail (Probability inequalities for sums of bounded random variables, 1963,
    theorem 1).
    """
    n = times.count
    for k in range(n // 100 + 1, n + 1):
        if n * _divergence(k / n, 0.01) >= -math.log(CHANCE):
            return times.quantile_ns((n - k + 0.5) / n)
    return float("nan")


def surely_above(found: int, asked: int, share: float) -> bool:
    """Whether ``found`` of ``asked`` say that more than ``share`` are such, wrong with a chance of at most `CHANCE`.

    By the same bound; a share of 0 is passed by one.
    """
    if not share or found <= share * asked:
        return found > share * asked
    return asked * _divergence(found / asked, share) >= -math.log(CHANCE) * (1.0 - 1e-9)


def _divergence(a: float, b: float) -> float:
    """Kullback and Leibler's, of a coin of chance ``a`` from one of chance ``b``, in nats."""
    return sum(x * math.log(x / y) for x, y in ((a, b), (1.0 - a, 1.0 - b)) if x)


def breaches(budget: Budget, *, predict_p99_ns: float, rss_bytes: int) -> list[str]:
    """Every limit that is passed, as a sentence with both figures; empty when all is well."""
    found = []
    if budget.predict_p99_ns and predict_p99_ns > budget.predict_p99_ns:
        found.append(
            f"predict p99 of {predict_p99_ns / 1e3:.1f} us CPU is above "
            f"the budget of {budget.predict_p99_ns / 1e3:.1f} us"
        )
    if budget.rss_bytes and rss_bytes > budget.rss_bytes:
        found.append(
            f"RSS of {rss_bytes / 1e6:.1f} MB is above the budget of {budget.rss_bytes / 1e6:.1f} MB"
        )
    return found


# ── the process ────────────────────────────────────────────────────────────────────────────────────────

HARD_ACTIONS: Final = ("report", "shed", "smaller_batch", "roll_back")
HARD_SHARE: Final = 0.9
"""Of the control group's memory limit: the kernel kills at the limit, so ours comes first."""
SOFT_SHARE: Final = 0.9
"""Of the hard limit, where no soft one is declared."""
CALM_SHARE: Final = 0.95
"""A soft limit counts as kept again below this share of it, so that a figure on the line is not an event a second."""
CALM_MC: Final = 3_000
CPU_SPAN_NS: Final = 60_000_000_000
STEP_NS: Final = 10_000_000_000
"""How long an action may take to show in the resident memory before the next, harder one."""
GIVE_UP_NS: Final = 600_000_000_000
"""How long rows are shed in vain before the process gives up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What the process may use; 0 means no limit. ``cpu_soft_ppm`` is a share of one core over a minute.

    Passing a soft limit is an event. Passing ``rss_bytes``, the hard one, has ``on_hard`` done beside the event, until
    resident memory is below ``rss_soft_bytes`` again: ``shed`` answers rows with an error, ``smaller_batch`` halves the
    largest batch, ``report`` does nothing more. Before either of these a running trial ends; ``roll_back`` sheds where
    there is none.

    Raises `ConfigError` for an unknown action or a soft limit above the hard one.
    """

    rss_soft_bytes: int = 0
    rss_bytes: int = 0
    cpu_soft_ppm: int = 0
    temperature_soft_mc: int = 0
    on_hard: str = "report"

    def __post_init__(self) -> None:
        if self.on_hard not in HARD_ACTIONS:
            raise ConfigError(
                f"a hard limit's action is one of {', '.join(HARD_ACTIONS)}, not {self.on_hard!r}"
            )
        if self.rss_bytes and self.rss_soft_bytes > self.rss_bytes:
            raise ConfigError(
                f"the soft limit of {_mb(self.rss_soft_bytes)} is above the hard limit of {_mb(self.rss_bytes)}"
            )

    def within(self, memory_limit_bytes: int) -> "Limits":
        """These limits, completed for a control group with this memory limit (0: none).

        The hard limit is `HARD_SHARE` of the group's, or the declared one where that is stricter: whatever grows slower
        than the guard looks is acted on and reported before the kernel kills for it. A soft limit that was not
        declared, or that lies above the hard one now, is `SOFT_SHARE` of the hard one.
        """
        hard = _stricter(self.rss_bytes, int(HARD_SHARE * memory_limit_bytes))
        soft = self.rss_soft_bytes
        if hard and not 0 < soft <= hard:
            soft = int(SOFT_SHARE * hard)
        return replace(self, rss_soft_bytes=soft, rss_bytes=hard)


@dataclass(frozen=True, slots=True)
class LimitPassed:
    """Say that a limit was passed: ``limit`` is ``rss_soft``, ``rss``, ``cpu_soft`` or ``temperature_soft``."""

    limit: str
    reason: str


@dataclass(frozen=True, slots=True)
class LimitKept:
    """Say that a limit which had been passed is kept again."""

    limit: str
    reason: str


@dataclass(frozen=True, slots=True)
class Shed:
    """Answer rows with an error from now on, or no longer."""

    on: bool


@dataclass(frozen=True, slots=True)
class SetBatch:
    """Run no more than this many rows at once; 0 means as many as come."""

    rows: int


@dataclass(frozen=True, slots=True)
class Lighten:
    """Let the model that the trial is compared with go: its memory is not the candidate's fault."""


@dataclass(frozen=True, slots=True)
class EndTrial:
    """Roll the running trial back for this reason."""

    reason: str


@dataclass(frozen=True, slots=True)
class GiveUp:
    """End the process and have it started again: shedding did not help, so what fills the memory is not the rows."""

    reason: str


Decision = LimitPassed | LimitKept | Shed | SetBatch | Lighten | EndTrial | GiveUp


class Guard:
    """Watches the process: feed it what that uses, perform what it decides. Time is the uptime it is fed.

    Each limit that is passed is one `LimitPassed`, and one `LimitKept` when it is kept again; between them nothing is
    said, however the figure moves. The hard limit's action is decided once. On trial the model that this is compared
    with is let go first, and the trial ends at the next look where that was not enough. Where an action does not help
    within `STEP_NS`, the next one follows: batches are halved down to single rows, and after that, or after a trial was
    rolled back, rows are shed; when `GIVE_UP_NS` of that were in vain the process should end. ``report`` has no next
    one. What was decided is undone when resident memory is below the soft limit.

    ``max_batch`` is the configured one, to halve from and to return to; where it is 0, batches count as `UNBOUNDED`.
    """

    UNBOUNDED: Final = 4096

    def __init__(self, limits: Limits, *, max_batch: int = 0) -> None:
        self._limits: Final = limits
        self._above = False
        self._whole_batch: Final = max_batch
        self._batch = max_batch or self.UNBOUNDED
        self._soft = False
        self._hard = False
        self._hot = False
        self._busy = False
        self._shedding = False
        self._lightened = False
        self._acted_ns = 0
        self._cpu: tuple[int, int] | None = None

    @property
    def limits(self) -> Limits:
        """What it holds the process to."""
        return self._limits

    @property
    def over(self) -> str:
        """``hard`` or ``soft`` while that limit of the resident memory is passed, else ""."""
        return "hard" if self._hard else "soft" if self._soft else ""

    def observe(self, health: Health, *, on_trial: bool) -> list[Decision]:
        """What to do about ``health``, in order; ``on_trial`` is whether a trial runs that can be rolled back.

        Figures of 0 are unknown.
        """
        decisions: list[Decision] = []
        if health.rss_bytes:
            decisions += self._memory(health, on_trial=on_trial)
        if self._limits.temperature_soft_mc and health.temperature_mc:
            decisions += self._heat(health.temperature_mc)
        if self._limits.cpu_soft_ppm and health.uptime_ns:
            decisions += self._work(health)
        return decisions

    # ── memory ─────────────────────────────────────────────────────────────────────────────────────────

    def _memory(self, health: Health, *, on_trial: bool) -> list[Decision]:
        limits, rss_bytes = self._limits, health.rss_bytes
        soft, hard = limits.rss_soft_bytes, limits.rss_bytes
        rises, self._above = rss_bytes > hard and not self._above, rss_bytes > hard
        decisions: list[Decision] = []
        if soft and not self._soft and rss_bytes > soft:
            self._soft = True
            decisions.append(
                LimitPassed("rss_soft", f"RSS of {_mb(rss_bytes)} is above the soft limit of {_mb(soft)}")
            )
        if hard and rss_bytes > hard:
            reason = f"RSS of {_mb(rss_bytes)} is above the hard limit of {_mb(hard)}"
            if not self._hard:
                self._hard = True
                decisions.append(LimitPassed("rss", reason))
                decisions += self._act(health.uptime_ns, reason, on_trial=on_trial, first=True)
            elif on_trial and rises:  # another trial's, it may be
                decisions += self._act(health.uptime_ns, reason, on_trial=True, first=True)
            elif self._lightened or health.uptime_ns >= self._acted_ns + STEP_NS:
                decisions += self._act(health.uptime_ns, reason, on_trial=on_trial, first=False)
        if self._hard and rss_bytes < (soft or CALM_SHARE * hard):
            self._hard = False
            decisions += self._undo()
            decisions.append(LimitKept("rss", f"RSS is {_mb(rss_bytes)} again"))
        if self._soft and rss_bytes < CALM_SHARE * soft:
            self._soft = False
            decisions.append(LimitKept("rss_soft", f"RSS is {_mb(rss_bytes)} again"))
        return decisions

    def _act(self, uptime_ns: int, reason: str, *, on_trial: bool, first: bool) -> list[Decision]:
        action = self._limits.on_hard
        if action == "report":
            return []
        lightened, self._lightened = self._lightened, first and on_trial
        if on_trial and (first or lightened):
            self._acted_ns = uptime_ns
            return [EndTrial(reason) if lightened else Lighten()]
        if self._shedding:
            in_vain = uptime_ns >= self._acted_ns + GIVE_UP_NS
            return (
                [GiveUp(f"{reason} after {GIVE_UP_NS // 60_000_000_000} minutes without a row")]
                if in_vain
                else []
            )
        self._acted_ns = uptime_ns
        if action == "smaller_batch" and self._batch > 1:
            self._batch //= 2
            return [SetBatch(self._batch)]
        self._shedding = True
        return [Shed(on=True)]

    def _undo(self) -> list[Decision]:
        decisions: list[Decision] = []
        self._lightened = False
        if self._shedding:
            self._shedding = False
            decisions.append(Shed(on=False))
        if self._batch != (self._whole_batch or self.UNBOUNDED):
            self._batch = self._whole_batch or self.UNBOUNDED
            decisions.append(SetBatch(self._whole_batch))
        return decisions

    # ── heat and work ──────────────────────────────────────────────────────────────────────────────────

    def _heat(self, temperature_mc: int) -> list[Decision]:
        limit = self._limits.temperature_soft_mc
        degrees = f"{temperature_mc / 1e3:.1f} °C"
        if not self._hot and temperature_mc > limit:
            self._hot = True
            return [
                LimitPassed("temperature_soft", f"{degrees} is above the soft limit of {limit / 1e3:.1f} °C")
            ]
        if self._hot and temperature_mc < limit - CALM_MC:
            self._hot = False
            return [LimitKept("temperature_soft", f"{degrees} again")]
        return []

    def _work(self, health: Health) -> list[Decision]:
        """Judges whole spans that follow one another, so that a burst of a second is not an event."""
        if self._cpu is None:
            self._cpu = health.uptime_ns, health.cpu_ns
        since_ns, spent_ns = self._cpu
        span_ns = health.uptime_ns - since_ns
        if span_ns < CPU_SPAN_NS:
            return []
        self._cpu = health.uptime_ns, health.cpu_ns
        share_ppm, limit = (health.cpu_ns - spent_ns) * 1_000_000 // span_ns, self._limits.cpu_soft_ppm
        percent = f"{share_ppm / 1e4:.1f} % of a core"
        if not self._busy and share_ppm > limit:
            self._busy = True
            return [LimitPassed("cpu_soft", f"{percent} is above the soft limit of {limit / 1e4:.1f} %")]
        if self._busy and share_ppm < CALM_SHARE * limit:
            self._busy = False
            return [LimitKept("cpu_soft", f"{percent} again")]
        return []


def _mb(size_bytes: int) -> str:
    return f"{size_bytes / 1e6:.1f} MB"

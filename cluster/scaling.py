"""How many replicas a part of the deployment needs: the policy, without Serve and without a clock.

What counts is time. A step of an engine costs a floor, however few generations share it, and on top what its prompts
and rows cost: *work*, in seconds, which adds up over generations and replicas whatever batches look like. So the
replicas' own clocks say what a generation costs (work done / generations ended), the work that comes (arrivals x that
cost, known before any of it is done), and a replica's *load*, its work per second. How much load a replica can take and
keep the objective for first tokens is learned, too: too late first tokens at less than that lower it, punctual ones at
that load raise it again.

Wanted is the most of: work that comes, with what waits, at replicas and before them, and what leaving replicas may hand
over, by the load that a replica takes; used KV blocks by the bound; one more while first tokens are late. More is
wanted at once. Fewer only after they sufficed, with a margin, for a while, a few at a time, and not before the last
ones to leave are done. What came faster than replicas could come is expected again: for much longer that many are kept.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from ..router.load_report import WINDOW_S, LoadReport
from .autoscale_config import AutoscalingConfig

FIRST_LOAD, LOWEST_LOAD, HIGHEST_LOAD = 0.7, 0.2, 0.85  # of a replica, 1 is all of its time: at first, and its bounds
MARGIN = 1.15  # fewer must suffice for so much more work
CLEAR_S = 5.0  # in which what waits is to be worked off,
DRAIN_S = 60.0  # and what leaving replicas may hand over
SETTLE_S = 30.0  # between two steps down
LESSON_S = 60.0  # late for so long, with as many replicas, and the load was too high
KEEP = 10  # so many times as long it is kept in mind what was more than all could take
SHARE = 4  # one of so many replicas leaves in one step, at least one
RATES_S = (5.0, 15.0, 60.0)  # over which arrivals are counted: the shorter it is, the clearer a rise must be
TREND_S = 120.0  # arrivals in so long against those in as long before: what rises so, rises while replicas start
LONGEST_START_S, MOST_AHEAD = 300.0, 1.3  # what is believed of that
COST_S = 300.0  # what a generation costs is a mean over about so long
ENOUGH = 10.0  # generations that ended, before their mean cost counts


class View(msgspec.Struct, frozen=True, kw_only=True):
    """What a decision is made from.

    target: replicas that there are to be, by the last decision. replicas: those that are there, each with its last
    word; None where it has said nothing yet, or not for long. queued: requests that wait for the first one.
    """

    target: int
    replicas: Mapping[str, LoadReport | None]
    queued: float = 0.0


class Decision(NamedTuple):
    """So many replicas, and why. reason: one of a few words, for a metric; words: a sentence, for people."""

    replicas: int
    reason: str
    words: str


class _Need(NamedTuple):
    """replicas: a fraction counts."""

    replicas: float
    reason: str
    words: str


class _Level(NamedTuple):
    """So many replicas would have sufficed with a margin. keep: for so many times the patience that counts."""

    at_s: float
    replicas: float
    keep: int


class _Flow(NamedTuple):
    """What happened in the seconds before a moment. Faded counts are fractions."""

    at_s: float
    seconds: float
    arrived: float
    started: float
    finished: float
    computed: float
    work_s: float

    def faded(self, share: float) -> _Flow:
        """So much of all but the moment."""
        return _Flow(self.at_s, *(share * each for each in self[1:]))


class Scaling:
    """One part's policy. Pure: `decide` is told the time, in seconds from any moment on, which never goes back."""

    def __init__(self, config: AutoscalingConfig) -> None:
        self.config = config  # may be another one from the next decision on
        self._began: float | None = None
        self._looked_at = 0.0
        self._worked_at = 0.0
        self._changed_at = 0.0  # replicas came or went
        self._raised_at: float | None = None  # since when the first of those that are on their way is
        self._start_s = 0.0  # the last one took to come
        self._stepped_at = -math.inf  # down
        self._wanted_since: float | None = None  # more than there are to be
        self._learned_at = 0.0
        self._punctual_at = 0.0  # first tokens were, when they last were
        self._max_load = FIRST_LOAD
        self._older: frozenset[str] = frozenset()  # replicas that were there before us, with totals of then
        self._last: dict[str, LoadReport] = {}
        self._gone: dict[str, tuple[float, int]] = {}  # leavers -> when they were last seen, tokens they owed then
        self._flows: deque[_Flow] = deque()
        self._sufficed: list[_Level] = []
        self._queued: int | None = None  # before any replica, at the last look
        self._costs = _Flow(0.0, 0.0, 0, 0, 0, 0, 0.0)  # fading sums

    @property
    def max_load(self) -> float:
        """The load that a replica is trusted with, as learned."""
        return self._max_load

    def decide(self, view: View, now: float) -> Decision:
        """How many replicas there should be from now on."""
        config = self.config
        if self._began is None:
            self._began = self._looked_at = self._worked_at = self._changed_at = now
            self._older = frozenset(view.replicas)
        self._hear(view, now)
        if not view.replicas:
            return self._asleep(view, now)
        if not self._last.keys() & view.replicas.keys():
            return self._bounded(view.target, "unknown", "no replica has reported yet")
        serving = [report for report in view.replicas.values() if report is None or not report.leaving]
        needs = self._needs(view, serving, now)
        if self._is_idle(now):
            need = _Need(0.0, "idle", f"nobody has asked for {config.idle_s:g} s")
        else:
            self._learn(view, serving, now)
            need = max(needs, key=lambda need: need.replicas)
        wanted = math.ceil(need.replicas - 1e-9)
        if wanted > view.target:
            return self._up(view, wanted, need, now)
        self._wanted_since = None
        return self._down(view, need, now)

    # What is known

    def _hear(self, view: View, now: float) -> None:
        """Take in what has happened since the last look."""
        arrived = started = finished = computed = 0
        work_s = 0.0
        floor_s = min((report.floor_s for report in view.replicas.values() if report and report.floor_s), default=0.0)
        for replica, report in view.replicas.items():
            before = self._last.get(replica) or (None if replica in self._older else LoadReport())
            if report is None or before is None or report.arrived < before.arrived or report.busy_s < before.busy_s:
                continue
            steps, busy_s = report.steps - before.steps, report.busy_s - before.busy_s
            arrived += report.arrived - before.arrived
            started += report.started - before.started
            finished += report.finished - before.finished
            computed += report.computed - before.computed
            work_s += max(0.0, busy_s - steps * floor_s)
        if told := [report for report in view.replicas.values() if report]:
            queued = max(report.num_queued for report in told)
            joined = 0 if self._queued is None else queued - self._queued
            arrived, self._queued = arrived + joined, queued
        self._note_changes(view, now)
        flow = _Flow(now, max(1e-6, now - self._looked_at), arrived, started, finished, computed, work_s)
        self._flows.append(flow)
        while self._flows[0].at_s < now - 2 * TREND_S:
            self._flows.popleft()
        fade = math.exp(-flow.seconds / COST_S)
        self._costs = _sum([self._costs.faded(fade), flow])
        self._looked_at = now
        if view.queued or arrived or self._queued or any(report.live for report in told):
            self._worked_at = now

    def _note_changes(self, view: View, now: float) -> None:
        """Who has come, who has gone, and what the latter owed."""
        before = self._last.keys()
        if view.replicas.keys() - before or before - view.replicas.keys():
            self._changed_at = now
        if view.replicas.keys() - before:
            self._worked_at = now  # it was wanted by somebody
            if self._raised_at is not None:
                self._start_s, self._raised_at = min(LONGEST_START_S, now - self._raised_at), None
        for replica in before - view.replicas.keys():
            self._gone[replica] = now, self._last[replica].tokens_owed
        self._gone = {name: gone for name, gone in self._gone.items() if now - gone[0] < DRAIN_S}
        known = {name: report or self._last.get(name) for name, report in view.replicas.items()}
        self._last = {name: report for name, report in known.items() if report is not None}

    def _rate(self, window_s: float, now: float) -> _Flow:
        """Sums over the window; its seconds are those that were seen. Who leaves a queue is no negative arrival."""
        since = now - window_s
        rate = _sum([flow for flow in self._flows if flow.at_s > since])
        return rate._replace(arrived=max(0.0, rate.arrived))

    def _cost_s(self) -> float:
        """Work that a generation is, in the mean; 0 while nobody knows. One that runs counts half."""
        done = (self._costs.started + self._costs.finished) / 2
        return self._costs.work_s / done if done >= ENOUGH else 0.0

    def _token_s(self) -> float:
        return self._costs.work_s / self._costs.computed if self._costs.computed else 0.0

    def _coming(self, now: float, *, doubt: float = 2.0) -> tuple[float, float]:
        """(work that comes in a second, generations that come): over a minute, or less where that is clearly more.

        doubt: by so many deviations of a Poisson count.
        """
        whole = self._rate(RATES_S[-1], now)
        arrivals = whole.arrived / max(whole.seconds, RATES_S[0])
        for window_s in RATES_S[:-1]:
            flow = self._rate(window_s, now)
            surely = flow.arrived - doubt * math.sqrt(flow.arrived)
            arrivals = max(arrivals, surely / max(flow.seconds, RATES_S[0]))
        return max(arrivals * self._cost_s(), whole.work_s / max(whole.seconds, RATES_S[0])), arrivals

    def _rise(self, now: float) -> float:
        """Factor by which what comes will have grown when a replica that is started now is there; at least 1."""
        late, both = self._rate(TREND_S, now), self._rate(2 * TREND_S, now)
        early = both.arrived - late.arrived
        if both.seconds < 1.9 * TREND_S or late.arrived - early < 3 * math.sqrt(both.arrived):
            return 1.0
        growth = (late.arrived - early) / TREND_S * (RATES_S[-1] / 2 + self._start_s) / max(late.arrived, 1.0)
        return min(MOST_AHEAD, 1.0 + growth)

    def _handed(self, view: View) -> float:
        """Work that leaving replicas, and those that have just gone, may hand over."""
        leaving = sum(report.tokens_owed for report in view.replicas.values() if report and report.leaving)
        done = {name: (self._looked_at - at_s) / max(self._token_s(), 1e-9) for name, (at_s, _) in self._gone.items()}
        gone = sum(max(0.0, owed - done[name]) for name, (_, owed) in self._gone.items())
        return (leaving + gone) * self._token_s()

    # What is needed

    def _needs(self, view: View, serving: list[LoadReport | None], now: float) -> list[_Need]:
        config = self.config
        told = [report for report in serving if report is not None]
        cost_s = self._cost_s()
        waiting = sum(report.num_waiting for report in told) + (self._queued or 0)
        coming, arrivals = self._coming(now, doubt=1.0 if waiting > 2 * len(serving) else 2.0)
        work = coming * self._rise(now) + self._handed(view) / DRAIN_S
        # What a replica keeps free serves to clear what waits.
        replicas = max(work / self._max_load, work + waiting * cost_s / max(CLEAR_S, config.ttft_s))
        kv = sum(report.kv_usage for report in view.replicas.values() if report)
        ttft_s = max(_ttft_s(told), *(report.queued_s for report in told), 0.0)
        needs = [
            _Need(1.0 if config.min_replicas == 0 else config.min_replicas, "bound", "no more is asked for"),
            _Need(
                replicas,
                "load",
                f"{arrivals:.3g} requests/s of {cost_s:.3g} s come, {waiting} wait; a replica takes a load of "
                f"{self._max_load:.2f}",
            ),
            _Need(kv / config.kv_usage, "kv", f"{kv:.2f} KV caches are in use, to be filled to {config.kv_usage:g}"),
        ]
        late = f"first tokens take {ttft_s:.3g} s, the objective is {config.ttft_s:g} s"
        more_helps = waiting > len(serving) or self._load(len(serving), now) > LOWEST_LOAD
        if ttft_s > config.ttft_s and more_helps and view.target <= len(serving):  # nobody is on the way
            needs.append(_Need(len(serving) + 1.0, "ttft", late))
        steady = max(need.replicas for need in needs if need.reason != "load")
        enough = max(coming * MARGIN / self._max_load, steady)  # what waits now is no reason to stay so many
        self._remember(_Level(now, enough, KEEP if 0 < len(serving) < coming else 1))
        return needs

    def _remember(self, level: _Level) -> None:
        patience_s = self.config.scale_down_after_s
        self._sufficed = [was for was in self._sufficed if level.at_s - was.at_s <= was.keep * patience_s]
        self._sufficed.append(level)

    def _load(self, num_serving: int, now: float) -> float:
        """Of a replica, while its last first tokens came."""
        lately = self._rate(WINDOW_S, now)
        return lately.work_s / max(lately.seconds, RATES_S[0]) / max(1, num_serving)

    def _learn(self, view: View, serving: list[LoadReport | None], now: float) -> None:
        """The load that a replica takes: what it had when it was late, what it had when it was not."""
        told = [report for report in serving if report is not None]
        ttft_s, objective = _ttft_s(told), self.config.ttft_s
        if ttft_s <= objective:
            self._punctual_at = now
        settled_at = max(self._changed_at, self._learned_at)
        if now - settled_at < LESSON_S or not told or view.target != len(serving):
            return
        load = self._load(len(serving), now)
        if now - max(settled_at, self._punctual_at) > LESSON_S and load < self._max_load:
            self._max_load = max(LOWEST_LOAD, 0.9 * self._max_load)  # a little: it may be late for other reasons
        elif 0 < ttft_s < objective / 2 and load > 0.9 * self._max_load:
            self._max_load = min(HIGHEST_LOAD, 1.02 * self._max_load)
        else:
            return
        self._learned_at = now

    # What follows

    def _asleep(self, view: View, now: float) -> Decision:
        """Nobody is there: on purpose, or the first is on its way."""
        if view.queued:
            return self._bounded(max(1, view.target), "wake", "somebody waits for the first replica")
        if not view.target or self._is_idle(now):
            return self._bounded(0, "idle", "asleep: nobody asks")
        return self._bounded(view.target, "start", "the first replica is on its way")

    def _is_idle(self, now: float) -> bool:
        return self.config.min_replicas == 0 and now - self._worked_at >= self.config.idle_s

    def _up(self, view: View, wanted: int, need: _Need, now: float) -> Decision:
        self._wanted_since = now if self._wanted_since is None else self._wanted_since
        if now - self._wanted_since < self.config.scale_up_after_s:
            return self._bounded(view.target, "settle", f"{wanted} are wanted, not for long enough: {need.words}")
        if self._raised_at is None and view.target <= len(view.replicas) < wanted:
            self._raised_at = now
        return self._bounded(wanted, need.reason, need.words)

    def _down(self, view: View, need: _Need, now: float) -> Decision:
        """As many as sufficed all the time, but not too many fewer at once."""
        assert self._began is not None, "decide sets it"
        if need.reason == "idle":
            return self._bounded(0 if view.target <= 1 else 1, need.reason, need.words)
        stay = self._bounded(view.target, need.reason, need.words)
        if need.replicas <= view.target - 1:
            stay = self._bounded(view.target, "keep", f"fewer would do, not for long enough: {need.words}")
        enough = math.ceil(max(need.replicas, *(level.replicas for level in self._sufficed)) - 1e-9)
        if enough >= view.target or now - self._began < self.config.scale_down_after_s:
            return stay
        if now - self._stepped_at < SETTLE_S or view.target > len(view.replicas) or self._handed(view) > 0:
            return stay
        target = max(enough, view.target - max(1, view.target // SHARE))
        while target < view.target and not self._holds(view, target, now):
            target += 1
        if target == view.target:
            return stay
        self._stepped_at = now
        sufficed = f"so many sufficed for {self.config.scale_down_after_s:g} s"
        return self._bounded(target, need.reason, f"{sufficed}: {need.words}")

    def _holds(self, view: View, target: int, now: float) -> bool:
        """Whether so many could also take over what the fullest of the others still owe."""
        owed = sorted((report.tokens_owed for report in view.replicas.values() if report), reverse=True)
        handed = sum(owed[: view.target - target]) * self._token_s()
        return MARGIN * self._coming(now)[0] + handed / DRAIN_S <= target * self._max_load

    def _bounded(self, replicas: int, reason: str, words: str) -> Decision:
        low, high = self.config.min_replicas, self.config.max_replicas
        if replicas > high:
            return Decision(high, "max", f"max_replicas; {replicas} are wanted: {words}")
        return Decision(max(low, replicas), reason if replicas >= low else "min", words)


def _sum(flows: list[_Flow]) -> _Flow:
    """All together; at the last one's moment."""
    return _Flow(
        flows[-1].at_s,
        sum(flow.seconds for flow in flows),
        sum(flow.arrived for flow in flows),
        sum(flow.started for flow in flows),
        sum(flow.finished for flow in flows),
        sum(flow.computed for flow in flows),
        sum(flow.work_s for flow in flows),
    )


def _ttft_s(reports: list[LoadReport]) -> float:
    """Nine of ten first tokens come in this time, about: each replica's figure by the number of its first tokens."""
    count = sum(report.num_first for report in reports)
    return sum(report.num_first * report.ttft_s for report in reports) / count if count else 0.0

"""Who is to blame, judged without processes or clocks: what the driver hears goes in, a verdict comes out."""

import signal

import pytest

from shoal.parallel.control import Beat, Failed
from shoal.parallel.grid import Grid
from shoal.parallel.watch import SETTLE_S, Fault, GroupLimits, Watch, failure_of

LIMITS = GroupLimits(silence_s=5.0, step_timeout_s=8.0)
TICK_S = 0.25


class Heard:
    """Ranks that beat each quarter of a second from where they are, and a watcher that asks as often."""

    def __init__(self, *stations):
        self.now = 100.0
        self.watch = Watch(len(stations), LIMITS, now=self.now)
        self.stations = dict(enumerate(stations))
        self.counts = dict.fromkeys(self.stations, 0)
        self.waiting_since = None

    def at(self, rank, station):
        self.stations[rank] = station
        self.counts[rank] += 1

    def until(self, seconds):
        """The verdict within so many seconds, and when it came."""
        end = self.now + seconds
        while self.now < end:
            self.now += TICK_S
            for rank, station in self.stations.items():
                self.watch.beat(rank, Beat(station, self.counts[rank]), self.now)
            fault = self.watch.fault(self.now, waiting_since=self.waiting_since)
            if fault is not None:
                return fault
        return None


def failed(kind="ValueError", **about):
    return Failed(kind=kind, message="text", station="compute", **about)


def test_nobody_is_blamed_while_no_result_is_waited_for():
    heard = Heard("plan", "plan")
    assert heard.until(60.0) is None
    heard.waiting_since = heard.now
    assert heard.until(LIMITS.step_timeout_s - 1) is None


def test_a_step_may_take_for_ever_while_somebody_moves():
    heard = Heard("compute", "receive")
    heard.waiting_since = heard.now
    for _ in range(10):
        heard.at(0, "compute")
        assert heard.until(6.0) is None


@pytest.mark.parametrize("guilty", range(4))
def test_who_hangs_is_not_who_waits(guilty):
    heard = Heard("plan", "receive", "all_reduce", "send")
    heard.waiting_since = heard.now
    heard.until(2.0)
    heard.at(guilty, "compute")
    began = heard.now
    fault = heard.until(10.0)
    assert (fault.rank, fault.kind, fault.station) == (guilty, "stuck", "compute")
    assert heard.now - began < 9.0


def test_of_two_that_compute_the_one_that_has_stood_longer_hangs():
    heard = Heard("compute", "compute")
    heard.waiting_since = heard.now
    for _ in range(4):
        heard.at(0, "compute")
        heard.until(1.0)
    assert heard.until(10.0).rank == 1


def test_silence_is_named_before_anything_else_and_without_a_step():
    heard = Heard("compute", "plan")
    heard.waiting_since = heard.now
    heard.until(1.0)
    del heard.stations[1]
    fault = heard.until(6.0)
    assert (fault.rank, fault.kind, fault.station) == (1, "silent", "plan")
    assert fault.seconds > 5.0


def test_what_the_driver_slept_through_is_nobodys_silence():
    heard = Heard("plan", "plan")
    heard.until(1.0)
    heard.now += 60.0
    assert heard.watch.fault(heard.now, waiting_since=None) is None
    assert heard.until(20.0) is None


def test_a_death_comes_before_the_errors_it_causes():
    heard = Heard("compute", "compute", "compute")
    heard.watch.failed(0, failed("RuntimeError"), heard.now)
    assert heard.watch.fault(heard.now, waiting_since=None) is None  # others may still say more
    heard.watch.ended(2, heard.now)
    heard.watch.ended(0, heard.now)
    fault = heard.watch.fault(heard.now + 2 * SETTLE_S, waiting_since=None)
    assert (fault.rank, fault.kind) == (2, "died")


def test_the_first_error_of_ones_own_comes_before_vain_waits():
    heard = Heard("compute", "compute", "compute")
    heard.watch.failed(0, failed("PeerTimeout", is_victim=True, peer=1), heard.now)
    heard.watch.failed(1, failed(slots=(4,)), heard.now)
    heard.watch.failed(2, failed(), heard.now)
    fault = heard.watch.fault(heard.now + 2 * SETTLE_S, waiting_since=None)
    assert (fault.rank, fault.kind, fault.failed.slots) == (1, "raised", (4,))


@pytest.mark.parametrize(("peer", "guilty"), [(1, 1), (2, 2), (None, 2), (-1, 2)])
def test_a_vain_wait_blames_who_is_waited_for(peer, guilty):
    """Where nobody is named, or the driver is: who is not waiting."""
    heard = Heard("all_reduce", "plan", "compute")
    heard.until(1.0)
    heard.watch.failed(0, failed("PeerTimeout", is_victim=True, peer=peer), heard.now)
    fault = heard.watch.fault(heard.now + 2 * SETTLE_S, waiting_since=None)
    assert (fault.rank, fault.kind) == (guilty, "stuck")


def test_a_driver_that_waits_in_vain_gets_a_verdict():
    heard = Heard("plan", "compute")
    heard.watch.missed(None, heard.now)
    assert heard.until(1.0).rank == 1


@pytest.mark.parametrize(
    ("fault", "status", "text", "is_suspect"),
    [
        (Fault(1, "died", "step"), -signal.SIGKILL, "was ended by SIGKILL at 'step'", False),
        (Fault(1, "died", "step"), -signal.SIGTERM, "was ended by SIGTERM at 'step'", False),
        (Fault(1, "died", "step"), -signal.SIGSEGV, "was ended by SIGSEGV at 'step'", True),
        (Fault(1, "died", "step"), 0, "ended with exit status 0 at 'step'", True),
        (Fault(1, "died", "step"), 7, "ended with exit status 7 at 'step': words", True),
        (Fault(1, "died", "step"), None, "the connection to rank 1 (stage 0 of 1, shard 1 of 2) was lost", False),
        (Fault(1, "silent", "step", 5.02), None, "has given no sign of life for 5.0 s, last at 'step'", True),
        (Fault(1, "stuck", "step", 8.1), None, "has hung for 8.1 s at 'step'", True),
        (Fault(1, "raised", "step", 0.0, failed()), None, "raised ValueError at 'step': text", True),
    ],
)
def test_the_fault_in_words(fault, status, text, is_suspect):
    failure = failure_of(fault, Grid(tp=2).place(1), status=status, last_words="words")
    assert text in str(failure)
    assert "rank 1 (stage 0 of 1, shard 1 of 2)" in str(failure)
    assert (failure.rank, failure.station, failure.is_suspect) == (1, "step", is_suspect)

"""Real rank processes: they start, execute in order, and whatever ends one of them is named and ends them all."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import pytest

from shoal.parallel.grid import Grid
from shoal.parallel.group import GroupFailure, GroupStartError
from shoal.parallel.launcher import ProcessLauncher
from shoal.parallel.rank_group import RankGroup
from shoal.parallel.rank_start import Program
from shoal.parallel.watch import GroupLimits
from shoal.parallel.wiring import WireSizes

HERE = Path(__file__).parent
PATH = os.pathsep.join(filter(None, [str(HERE), os.environ.get("PYTHONPATH")]))
LIMITS = GroupLimits(start_timeout_s=60.0)
QUICK = GroupLimits(start_timeout_s=60.0, silence_s=1.5, step_timeout_s=2.0)


def ask(**order):
    return json.dumps(order).encode()


ECHO = ask(do="echo")


def rank_group(grid, *, factory="ranks:obedient", argument=b"7", limits=LIMITS, **program):
    return RankGroup(
        grid,
        launcher=ProcessLauncher(environment={"PYTHONPATH": PATH}),
        program=Program(factory=factory, argument=argument, sizes=WireSizes(), **program),
        encode_plan=bytes,
        decode_result=json.loads,
        limits=limits,
    )


@contextmanager
def running(*args, **kwargs):
    """A group, and afterwards nothing of it."""
    with nothing_left():
        group = rank_group(*args, **kwargs)
        try:
            yield group
        finally:
            group.close()


@contextmanager
def nothing_left():
    """Neither processes, threads nor names of shared memory; others on this machine may have such names for a while."""
    before = shared_memory()
    processes, threads = children(), threading.active_count()
    yield
    assert within(1.0, lambda: not set(children()) - set(processes))
    assert within(5.0, lambda: threading.active_count() <= threads)
    new = shared_memory() - before
    assert within(30.0, lambda: not new & shared_memory())


def is_there(pid):
    """Nobody but init can bury an orphan, and it may take its time."""
    try:
        state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return (state, ppid) != ("Z", "1")


def shared_memory():
    return {path.name for path in Path("/dev/shm").glob("shoal-*")}


def children():
    """Processes whose parent we are."""
    found = Path(f"/proc/{os.getpid()}/task").glob("*/children")
    return [pid for file in found for pid in file.read_text().split()]


def parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def within(seconds, is_so):
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def gone_within(seconds, pids):
    return within(seconds, lambda: not any(is_there(pid) for pid in pids))


def step(group, **order):
    group.submit(ask(**order))
    return group.collect()


def collect_all(group):
    while True:
        group.collect()


def failure_of(group, **order):
    """What a plan comes to, and after how long."""
    began = time.monotonic()
    with pytest.raises(GroupFailure) as caught:
        step(group, **order)
    return caught.value, time.monotonic() - began


def test_plans_in_flight_come_back_in_order_however_late_they_are_fetched():
    heard = []
    limits = GroupLimits(start_timeout_s=60.0, step_timeout_s=1.0)
    with running(Grid(pp=2), on_progress=heard.append, limits=limits) as group:
        infos = [(info.rank, info.stage, info.details["argument"]) for info in group.ranks()]
        assert infos == [(0, 0, "7"), (1, 1, "7")]
        assert sorted(heard) == [
            "rank 0 (stage 0 of 2, shard 0 of 1): built",
            "rank 1 (stage 1 of 2, shard 0 of 1): built",
        ]
        assert group.depth == 3
        for value in range(3):
            group.submit(ask(do="echo", value=value))
        time.sleep(1.5)  # the driver has other things to do: its ranks do not hang
        for value in range(3, 20):
            assert group.collect() == [value - 2, value - 3]
            group.submit(ask(do="echo", value=value))
        assert [group.collect()[1] for _ in range(3)] == [17, 18, 19]


def test_ranks_compute_together():
    with running(Grid(tp=2, pp=2), factory="ranks:summing") as group:
        for value in (10, 20):
            group.submit(b"%d" % value)
        assert [group.collect(), group.collect()] == [10 + 0 + 1 + 2 + 3, 20 + 6]


def test_a_killed_rank_ends_its_group_at_once_and_no_other_and_the_group_starts_anew():
    with running(Grid()) as other, running(Grid(tp=2)) as group:
        other.submit(ask(do="echo", value="other"))
        pids = [info.pid for info in group.ranks()]
        assert step(group, do="echo", value="one") == [1, "one"]
        threading.Timer(0.6, os.kill, (pids[1], signal.SIGKILL)).start()  # after a heartbeat has told where it is
        failure, seconds = failure_of(group, do="sleep", seconds=60)
        assert seconds < 0.6 + 1.0
        assert (failure.rank, failure.is_suspect, failure.slots) == (1, False, ())
        assert str(failure) == "rank 1 (stage 0 of 1, shard 1 of 2) was ended by SIGKILL at 'compute'"
        assert gone_within(1.0, pids)
        with pytest.raises(GroupFailure, match="SIGKILL"):
            group.submit(ECHO)
        group.restart()
        assert not set(pids) & {info.pid for info in group.ranks()}
        assert step(group, do="echo", value=5) == [1, 5]  # a new worker
        assert other.collect() == [1, "other"]


def test_a_restart_is_served_by_what_the_first_start_has_imported():
    with running(Grid(tp=2), factory="ranks:summing") as group:
        (nursery,) = {parent(info.pid) for info in group.ranks()}
        pids = [info.pid for info in group.ranks()]
        group.restart()
        assert {parent(info.pid) for info in group.ranks()} == {nursery}
        assert not any(map(is_there, pids))
        group.submit(b"1")
        assert group.collect() == 2.0
    assert gone_within(1.0, [nursery])


def test_ranks_end_with_the_process_that_they_were_forked_from_and_the_group_starts_anew():
    with running(Grid(tp=2)) as group:
        pids = [info.pid for info in group.ranks()]
        nursery = parent(pids[0])
        os.kill(nursery, signal.SIGKILL)
        failure, seconds = failure_of(group, do="sleep", seconds=60)
        assert seconds < 5.0
        assert "SIGKILL" in str(failure)
        assert not failure.is_suspect
        assert gone_within(1.0, [nursery, *pids])
        group.restart()
        assert nursery not in {parent(info.pid) for info in group.ranks()}
        assert step(group, do="echo", value=5) == [1, 5]


def test_death_in_idleness_and_a_start_that_is_given_up(tmp_path):
    """Death fails the next plan; and closing from another thread ends a start."""

    def close(text):
        threading.Thread(target=group.close).start()

    with running(Grid(), factory="ranks:once", argument=bytes(tmp_path / "been here"), on_progress=close) as group:
        pid = group.ranks()[0].pid
        os.kill(pid, signal.SIGTERM)
        assert gone_within(5.0, [pid])
        failure, _ = failure_of(group, do="echo")
        assert "SIGTERM" in str(failure)
        assert not failure.is_suspect
        with nothing_left(), pytest.raises(GroupStartError, match="closed"):
            group.restart()


@pytest.mark.parametrize(
    ("order", "text", "slots"),
    [
        ({"do": "blame", "slots": [3, 5]}, "raised SlotsFailed at 'softmax': rows are bad", (3, 5)),
        ({"do": "exit", "status": 3}, "ended with exit status 3 at 'softmax': last words", ()),
    ],
    ids=["raises", "exits"],
)
def test_what_a_rank_does_to_itself_is_suspect(order, text, slots):
    with running(Grid()) as group:
        # The heartbeat has to pass by for the station of a rank that ends without a word.
        group.submit(ask(do="sleep", seconds=0.6, at="softmax"))
        group.submit(ask(at="softmax", **order))
        with pytest.raises(GroupFailure) as caught:
            collect_all(group)
        failure = caught.value
        assert str(failure) == f"rank 0 (stage 0 of 1, shard 0 of 1) {text}"
        assert (failure.rank, failure.is_suspect, failure.slots) == (0, True, slots)
        assert failure.station == "softmax"


def test_a_stopped_rank_is_named():
    with running(Grid(tp=2), limits=QUICK) as group:
        step(group, do="echo")
        os.kill(group.ranks()[1].pid, signal.SIGSTOP)
        failure, seconds = failure_of(group, do="sleep", rank=0, seconds=60)
        assert seconds < 8.0
        assert (failure.rank, failure.is_suspect) == (1, True)
        assert "no sign of life" in str(failure)


def test_a_hung_rank_is_named_with_its_station():
    with running(Grid(), limits=QUICK) as group:
        failure, seconds = failure_of(group, do="sleep", seconds=60, at="attention")
        assert seconds < 8.0
        assert (failure.rank, failure.station, failure.is_suspect) == (0, "attention", True)
        assert "has hung" in str(failure)


@pytest.mark.parametrize(
    ("factory", "kind", "text"),
    [
        ("ranks:misconfigured", "ConfigError", "did not start: ConfigError: max_model_len is 10: at least 16"),
        ("ranks:broken", "", "did not start: it ended with exit status 3: Traceback: of a compiler"),
        ("ranks:absent", "AttributeError", "did not start: AttributeError: module 'ranks' has no attribute 'absent'"),
        ("nowhere:obedient", "ModuleNotFoundError", "did not start: ModuleNotFoundError: No module named 'nowhere'"),
    ],
)
def test_ranks_that_do_not_start(capfd, factory, kind, text):
    with nothing_left(), pytest.raises(GroupStartError) as caught:
        rank_group(Grid(tp=2), factory=factory)
    assert str(caught.value).endswith(text)
    assert str(caught.value).startswith("rank ")
    assert caught.value.kind == kind
    assert capfd.readouterr() == ("", "")


def test_ranks_that_take_too_long(tmp_path):
    limits = GroupLimits(start_timeout_s=2.0)
    with (
        nothing_left(),
        pytest.raises(GroupStartError, match=r"waited 2 s for the ranks .*; still missing: rank 0 "),
    ):
        rank_group(Grid(), factory="ranks:once", argument=bytes(tmp_path), limits=limits)


def test_a_device_that_is_not_there():
    with nothing_left(), pytest.raises(GroupStartError, match=r"rank 0 .* on node local has no tpu device, only cpu"):
        rank_group(Grid(), device="tpu")


def test_ranks_end_with_their_driver():
    """Killed without a chance to say anything, and its program was read from a pipe: there is no file to import."""
    program = """
        import signal
        from shoal.parallel.grid import Grid
        from shoal.parallel.launcher import ProcessLauncher
        from shoal.parallel.rank_group import RankGroup
        from shoal.parallel.rank_start import Program
        from shoal.parallel.wiring import WireSizes

        group = RankGroup(
            Grid(tp=2),
            launcher=ProcessLauncher(),
            program=Program(factory="ranks:obedient", argument=b"", sizes=WireSizes()),
            encode_plan=bytes,
            decode_result=bytes,
        )
        group.submit(b'{"do": "sleep", "rank": 0, "seconds": 60}')
        print(*(info.pid for info in group.ranks()), flush=True)
        signal.pause()
    """
    environment = {**os.environ, "PYTHONPATH": PATH, "PYTHONSAFEPATH": "1"}
    driver = subprocess.Popen([sys.executable, "-"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
    with driver:
        driver.stdin.write(textwrap.dedent(program).encode())
        driver.stdin.close()
        pids = [int(pid) for pid in driver.stdout.readline().split()]
        assert len(pids) == 2
        os.kill(pids[1], signal.SIGSTOP)  # cannot leave by itself
        pids.append(parent(pids[1]))
        driver.kill()
    left = [] if gone_within(2.0, pids) else list(filter(is_there, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left

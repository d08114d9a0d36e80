"""`ProcessLauncher` by itself: what it starts, what it says of it, and that nothing of it is left, whatever happens."""

import gc
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from contextlib import closing
from pathlib import Path

import pytest

from shoal.parallel import keeper
from shoal.parallel.control import RankStart
from shoal.parallel.launcher import ProcessLauncher

PATIENCE_S = 30.0


@pytest.fixture
def nobody():
    """A port on which nobody listens: a rank that dials it raises."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        yield sock.getsockname()[1]


@pytest.fixture
def mute():
    """A port that answers, with nothing: a rank that dials it waits for seconds."""
    with socket.create_server(("127.0.0.1", 0)) as sock:
        yield sock.getsockname()[1]


def starts(port, size=1, **options):
    return [RankStart(host="127.0.0.1", port=port, secret=bytes(32), rank=rank, **options) for rank in range(size)]


def within(seconds, is_so):
    deadline = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def is_there(pid):
    """Nobody but init can bury an orphan, and it may take its time."""
    try:
        state, ppid = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return (state, ppid) != ("Z", "1")


def children(pid):
    return [int(child) for file in Path(f"/proc/{pid}/task").glob("*/children") for child in file.read_text().split()]


def forked(nursery, size):
    """The ranks of a nursery, once they are all there."""
    assert within(PATIENCE_S, lambda: len(children(nursery)) == size)
    return children(nursery)


class Watched(ProcessLauncher):
    """Knows which process its ranks are forked from."""

    def nursery(self):
        before = set(children(os.getpid()))
        self.warm()
        (pid,) = set(children(os.getpid())) - before
        return pid


@pytest.fixture
def launcher():
    with closing(Watched(preload=())) as launcher:
        yield launcher


def test_a_rank_that_raises_ends_with_a_status_and_last_words(launcher, nobody):
    launcher.launch(starts(nobody))
    assert launcher.exit_status(0, timeout_s=PATIENCE_S) == 1
    launcher.kill()
    assert launcher.last_words(0).startswith("ConnectionRefusedError")
    assert (launcher.exit_status(7, timeout_s=0.0), launcher.last_words(7)) == (None, "")


def test_one_process_forks_start_after_start_and_outlives_them(launcher, mute):
    nursery = launcher.nursery()
    seen = []
    for _ in range(3):
        launcher.launch(starts(mute, 2))
        pids = forked(nursery, 2)
        assert launcher.exit_status(0, timeout_s=0.0) is None
        launcher.kill()
        assert not any(map(is_there, pids))
        assert [launcher.exit_status(rank, timeout_s=0.0) for rank in range(2)] == [-signal.SIGKILL] * 2
        seen += pids
    assert len(set(seen)) == 6
    assert is_there(nursery)
    launcher.close()
    assert not is_there(nursery)
    with pytest.raises(OSError, match="closed"):
        launcher.launch(starts(mute))


def test_a_rank_is_a_process_like_any_other(launcher, mute):
    """In a session of its own, with no share in what the nursery holds open, and it dies of what kills it."""
    nursery = launcher.nursery()
    launcher.launch(starts(mute, 2))
    pids = forked(nursery, 2)
    assert within(PATIENCE_S, lambda: all(os.getsid(pid) == pid for pid in pids))

    def held(pid):
        return {os.readlink(file) for file in Path(f"/proc/{pid}/fd").iterdir()} - {"/dev/null"}

    # Its stderr, and the line to its driver.
    assert within(PATIENCE_S, lambda: all(len(held(pid)) == 2 for pid in pids))
    assert not held(pids[0]) & held(nursery)
    assert not held(pids[0]) & held(pids[1])
    os.kill(pids[0], signal.SIGSEGV)
    assert launcher.exit_status(0, timeout_s=PATIENCE_S) == -signal.SIGSEGV
    assert is_there(pids[0]), "its number is not given to another before `kill`"
    assert launcher.exit_status(1, timeout_s=0.0) is None


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_nursery_that_dies_or_hangs_takes_its_ranks_along_and_is_replaced(launcher, mute, monkeypatch, how):
    monkeypatch.setattr(keeper, "KILL_TIMEOUT_S", 2.0)
    nursery = launcher.nursery()
    launcher.launch(starts(mute, 2))
    pids = forked(nursery, 2)
    os.kill(nursery, how)
    if how == signal.SIGKILL:
        assert launcher.exit_status(1, timeout_s=PATIENCE_S) == -signal.SIGKILL
    launcher.kill()
    assert within(2.0, lambda: not any(map(is_there, [nursery, *pids])))
    other = launcher.nursery()
    launcher.launch(starts(mute, 2))
    assert not set(forked(other, 2)) & set(pids)


def test_a_nursery_that_does_not_come_up_says_why(tmp_path, mute):
    (tmp_path / "poison.py").write_text("import os\nos.write(2, b'first\\nthe last words\\n')\nos._exit(3)\n")
    with closing(ProcessLauncher(environment={"PYTHONPATH": str(tmp_path)}, preload=("poison",))) as launcher:
        launcher.launch(starts(mute, 2))
        assert launcher.exit_status(1, timeout_s=PATIENCE_S) == 3
        assert launcher.last_words(1) == "the last words"


@pytest.mark.parametrize(
    "source",
    [
        "raise RuntimeError",
        "import threading, time\nthreading.Thread(target=time.sleep, args=(60,), daemon=True).start()",
    ],
    ids=["broken", "threads"],
)
def test_what_cannot_be_preloaded_does_no_harm(tmp_path, mute, source):
    (tmp_path / "heavy.py").write_text(source)
    environment = {"PYTHONPATH": str(tmp_path)}
    with closing(Watched(environment=environment, preload=("nowhere", "heavy"))) as launcher:
        nursery = launcher.nursery()
        launcher.launch(starts(mute, 2))
        forked(nursery, 2)
        assert len(list(Path(f"/proc/{nursery}/task").iterdir())) == 1


def test_torch_is_shared_by_forks(mute):
    with closing(Watched(preload=("torch",))) as launcher:
        nursery = launcher.nursery()
        launcher.launch(starts(mute))
        (pid,) = forked(nursery, 1)
        assert "libtorch_cpu" in Path(f"/proc/{pid}/maps").read_text()


def test_a_launcher_that_is_dropped_leaves_nothing(mute):
    launcher = Watched(preload=())
    nursery = launcher.nursery()
    launcher.launch(starts(mute))
    pids = forked(nursery, 1)
    del launcher
    gc.collect()
    assert within(PATIENCE_S, lambda: not any(map(is_there, [nursery, *pids])))


def test_nothing_survives_the_launchers_process(mute):
    program = f"""
        import signal
        from shoal.parallel.control import RankStart
        from shoal.parallel.launcher import ProcessLauncher

        launcher = ProcessLauncher(preload=())
        launcher.launch([RankStart(host="127.0.0.1", port={mute}, secret=bytes(32), rank=0)])
        print(flush=True)
        signal.pause()
    """
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-c", textwrap.dedent(program)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as driver:
        driver.stdout.readline()
        (nursery,) = children(driver.pid)
        pids = [nursery, *forked(nursery, 1)]
        os.kill(nursery, signal.SIGSTOP)  # does not hear the end of its line
        driver.kill()
    left = [] if within(2.0, lambda: not any(map(is_there, pids))) else list(filter(is_there, pids))
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left


@pytest.mark.parametrize(
    ("visible", "devices"),
    [(None, ["0", "1", "2"]), ("5,GPU-7", ["5", "GPU-7", ""])],
    ids=["all are visible", "two are visible"],
)
def test_every_rank_sees_one_device(tmp_path, nobody, visible, devices, monkeypatch):
    """As the driver library would, in whose place each rank looks for its devices."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    environment = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    (tmp_path / "spy.py").write_text(SPY)
    environment["PYTHONPATH"] = str(tmp_path)
    with closing(ProcessLauncher(environment=environment, preload=("spy",))) as launcher:
        launcher.launch(starts(nobody, 3, device="cuda"))
        assert [launcher.exit_status(rank, timeout_s=PATIENCE_S) for rank in range(3)] == [1, 1, 1]
        launcher.kill()
        assert [launcher.last_words(rank) for rank in range(3)] == [f"sees [{device}]" for device in devices]


SPY = """
import os, sys

def tell(kind, error, traceback):
    sys.stderr.write(f"sees [{os.environ['CUDA_VISIBLE_DEVICES']}]\\n")

sys.excepthook = tell
"""

"""The main module of a rank's own process, started by `launcher.ProcessLauncher`: what a whole process must set."""

import ctypes
import faulthandler
import signal
import sys

import msgspec

from .control import RankStart
from .rank import run_rank

PR_SET_PDEATHSIG = 1


def main() -> None:
    # A rank that hears its driver's line end leaves by itself; this one works for a stopped process, too.
    libc = ctypes.CDLL(None)
    if hasattr(libc, "prctl"):
        libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's
    faulthandler.enable()
    run_rank(msgspec.msgpack.decode(sys.stdin.buffer.read(), type=RankStart))


if __name__ == "__main__":
    main()

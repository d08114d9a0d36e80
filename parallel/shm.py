"""Memory that the processes of one node share, and how they wait for each other in it.

A `Segment` is a file in memory. A `Cell` in it is one number that only grows, that one process writes and others wait
for; all else (rings of bytes, meetings of shards) is bytes whose readers are told by a cell that they are there.

What is relied on: an aligned number of 8 bytes is read and written in one instruction (memoryview's "Q" is one `mov`),
and x86-64 makes stores visible in the order of the program, so whoever sees a cell's new value sees the bytes that were
written before it. Other processors promise less; there, this has not been tried.
"""

import ctypes
import errno
import mmap
import os
import platform
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

_FOLDER = Path("/dev/shm") if sys.platform == "linux" else Path(tempfile.gettempdir())
# Nobody is told when a sleeper's process dies, so every sleep looks around at times.
_LONGEST_SLEEP_S = 0.5
_POLL_S = 0.0005  # where there is no futex

CELL_BYTES = 128
MAX_WAITERS = 64
_LINE = 64


class Segment:
    """A file in memory, mapped. It lives as long as somebody maps it; its name is only needed to find it.

    The mapping ends with the last object that was made from `memory`, and cannot be pulled away from under them.
    """

    def __init__(self, name: str, descriptor: int, size: int) -> None:
        """Use `create` or `open`. The descriptor is closed; the mapping needs none."""
        self.name = name
        try:
            self.memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))

    @classmethod
    def create(cls, name: str, size: int) -> "Segment":
        """A new segment of zeros, for this user alone. Raises OSError, with the numbers if it does not fit."""
        descriptor = os.open(_FOLDER / name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        try:
            _allocate(descriptor, size)
        except OSError as problem:
            os.close(descriptor)
            unlink(name)
            raise _does_not_fit(problem.errno, size) from problem
        return cls(name, descriptor, size)

    @classmethod
    def open(cls, name: str, size: int, *, timeout_s: float) -> "Segment | None":
        """A segment that another process creates; None if it has not come in time."""
        end = time.monotonic() + timeout_s
        while True:
            try:
                descriptor = os.open(_FOLDER / name, os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                pass
            else:
                if os.fstat(descriptor).st_size >= size:  # its pages are there
                    return cls(name, descriptor, size)
                os.close(descriptor)
            if time.monotonic() > end:
                return None
            time.sleep(0.005)


def _allocate(descriptor: int, size: int) -> None:
    if sys.platform == "linux":
        # All pages at once: a page that cannot be had later is a SIGBUS in the middle of a step.
        os.posix_fallocate(descriptor, 0, size)
    else:
        os.ftruncate(descriptor, size)


def _does_not_fit(number: int | None, size: int) -> OSError:
    state = os.statvfs(_FOLDER)
    free = state.f_bavail * state.f_frsize
    return OSError(
        number,
        f"{size / 2**20:.1f} MiB of shared memory do not fit into {_FOLDER}, which has {free / 2**20:.1f} MiB free: "
        "enlarge it (docker run --shm-size, an emptyDir of medium Memory), or allow fewer tokens in a step",
    )


def unlink(name: str) -> None:
    """Take a segment's name away, where it still has one. Those who map it keep it."""
    (_FOLDER / name).unlink(missing_ok=True)


# Waiting


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a wait looks again and again before it sleeps: at full speed, then letting others run between looks.

    Looking sees a change within 0.1 us, waking a sleeper takes 5 us and more; but a process that looks keeps a core
    from one that works. So `spin_s` is for processes that have a core each.
    """

    spin_s: float = 0.0
    yield_s: float = 0.0


class Cell:
    """A number in shared memory that starts at 0 and grows: one process writes it, up to `MAX_WAITERS` wait for it.

    The number has a cache line, and so have the waiters' flags, of which each says that its waiter sleeps. The writer
    calls the kernel only where one is set.
    """

    def __init__(self, segment: Segment, offset: int, *, waiter: int = 0, patience: Patience | None = None) -> None:
        """offset: in bytes, a multiple of 8; `CELL_BYTES` are taken. waiter: this process's flag, where it waits."""
        assert waiter < MAX_WAITERS
        assert offset % 8 == 0
        self._number = memoryview(segment.memory)[offset : offset + 8].cast("Q")
        self._asleep = memoryview(segment.memory)[offset + _LINE : offset + _LINE + MAX_WAITERS]
        self._address = ctypes.c_void_p(segment.address + offset)
        self._waiter = waiter
        self._patience = patience or Patience()
        self._fence = threading.Lock()

    def read(self) -> int:
        return self._number[0]

    def publish(self, value: int) -> None:
        """Set the number, after all that was written before, and wake who sleeps for it."""
        self._number[0] = value
        # The flags must be read after the number is visible, or a waiter that looks for the last time and then sleeps
        # is missed. Taking a lock is a locked instruction and so a full fence; the waiter's is in the kernel's futex.
        self._fence.acquire()
        self._fence.release()
        if self._asleep.tobytes() != _NOBODY:
            _wake(self._address)

    def wait_for(self, target: int, timeout_s: float) -> bool:
        """Wait until the number is at least `target`; False if it is not by then. `inf`: wait for ever."""
        number = self._number
        if number[0] >= target:
            return True
        began = time.perf_counter()
        if self._patience.spin_s:
            end = began + self._patience.spin_s
            while time.perf_counter() < end:
                for _ in range(20):  # a look at the clock costs as much as two at the number
                    if number[0] >= target:
                        return True
        if self._patience.yield_s:
            end = began + min(self._patience.yield_s, timeout_s)
            while time.perf_counter() < end:
                os.sched_yield()
                if number[0] >= target:
                    return True
        return self._sleep(target, began + timeout_s)

    def _sleep(self, target: int, end: float) -> bool:
        self._asleep[self._waiter] = 1
        try:
            while (seen := self._number[0]) < target:
                left = end - time.perf_counter()
                if left <= 0:
                    return False
                # Returns at once if the number is no longer `seen`.
                _sleep_while(self._address, seen & 0xFFFFFFFF, min(left, _LONGEST_SLEEP_S))
        finally:
            self._asleep[self._waiter] = 0
        return True


_NOBODY = bytes(MAX_WAITERS)


# Futexes: see futex(2). Not of the private kind, as the waiters are processes.

_NUMBERS = {"x86_64": 202, "aarch64": 98}


class _Timespec(ctypes.Structure):
    _fields_ = [("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long)]


_LIBC = ctypes.CDLL(None, use_errno=True)
_FUTEX = ctypes.c_long(_NUMBERS[platform.machine()]) if platform.machine() in _NUMBERS else None
_HAS_FUTEX = sys.platform == "linux" and _FUTEX is not None
_WAIT, _WAKE, _ALL, _UNUSED = ctypes.c_int(0), ctypes.c_int(1), ctypes.c_int(2**31 - 1), ctypes.c_int(0)


def _sleep_while(address: ctypes.c_void_p, value: int, seconds: float) -> None:
    """Sleep until woken, while the 32 bits at the address are `value`, for `seconds` at most. May return early."""
    if not _HAS_FUTEX:
        time.sleep(min(seconds, _POLL_S))
        return
    limit = _Timespec(int(seconds), int(seconds % 1 * 1e9))
    if _LIBC.syscall(_FUTEX, address, _WAIT, ctypes.c_uint32(value), ctypes.byref(limit), None, _UNUSED):
        number = ctypes.get_errno()
        if number not in (errno.EAGAIN, errno.EINTR, errno.ETIMEDOUT):
            raise OSError(number, f"futex: {os.strerror(number)}")


def _wake(address: ctypes.c_void_p) -> None:
    """Wake all who sleep there. Without futexes nobody does: they poll."""
    if _HAS_FUTEX:
        _LIBC.syscall(_FUTEX, address, _WAKE, _ALL, None, None, _UNUSED)

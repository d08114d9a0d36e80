"""Compiles the C++ kernels of `csrc/` on the machine they run on, once: the library is kept in the user's cache.

Its name is a hash of sources, compiler and command, and the command names every instruction set that it may use. So a
home directory that machines share does no harm.
"""

import fcntl
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

SOURCES = Path(__file__).with_name("csrc")
INSTRUCTIONS = ("avx2", "fma", "f16c", "bmi2", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16")
"""What the kernels need of a processor, as Linux names it."""

_OPTIONS = ("-O3", "-std=c++17", "-fPIC", "-w", *(f"-m{name.replace('_', '')}" for name in INSTRUCTIONS))
_COMPILERS = ("g++", "c++", "clang++")
_LIMIT_S = 120.0


class UnavailableError(Exception):
    """There can be no native kernels here; the message says why."""


def build_library() -> Path:
    """The compiled kernels. Takes a few seconds the first time; processes that start together wait for one of them.

    Raises:
        UnavailableError: another processor, no compiler, no place for the library, or the compiler failed.
    """
    if missing := missing_instructions():
        raise UnavailableError(f"the processor lacks {', '.join(missing)}")
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise UnavailableError(f"no compiler ({', '.join(_COMPILERS)})")
    library = private_folder() / f"kernels-{_fingerprint(compiler)}.so"
    if library.exists():
        return library
    with library.with_name("lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.exists():
            _compile(compiler, library)
    return library


def missing_instructions() -> list[str]:
    """Those of `INSTRUCTIONS` that this machine has not; all of them where it cannot be told."""
    if not sys.platform.startswith("linux"):
        return list(INSTRUCTIONS)
    lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    return [name for name in INSTRUCTIONS if name not in flags]


def _fingerprint(compiler: str) -> str:
    digest = hashlib.sha256(repr((_OPTIONS, compiler, os.stat(compiler).st_mtime_ns)).encode())
    for source in sorted(SOURCES.iterdir()):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def private_folder() -> Path:
    """Where the library is kept: in the user's cache, or with other temporary files where there is no home.

    What lies there is executed, so nobody else may write to it.
    """
    reasons = []
    for place in ("~/.cache/shoal", f"{tempfile.gettempdir()}/shoal-{os.geteuid()}"):
        try:
            folder = Path(place).expanduser()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = folder.lstat()
        except (OSError, RuntimeError) as error:  # RuntimeError: the user is unknown to the system
            reasons.append(str(error))
            continue
        if stat.S_ISDIR(status.st_mode) and status.st_uid == os.geteuid() and not status.st_mode & 0o022:
            return folder
        reasons.append(f"{folder} is not this user's alone: chmod go-w it")
    raise UnavailableError("; ".join(reasons))


def _compile(compiler: str, library: Path) -> None:
    """Each source by itself, as many at once as there are cores."""
    sources = sorted(SOURCES.glob("*.cpp"))
    with tempfile.TemporaryDirectory(dir=library.parent) as scratch:
        made = Path(scratch) / library.name
        objects = [made.with_name(f"{source.stem}.o") for source in sources]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            commands = (
                [compiler, *_OPTIONS, "-c", str(s), "-o", str(o)] for s, o in zip(sources, objects, strict=True)
            )
            list(pool.map(_run, commands))
        _run([compiler, "-shared", *map(str, objects), "-o", str(made)])
        made.replace(library)  # whole or not at all


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} took over {_LIMIT_S:.0f} s") from None
    if done.returncode:
        message = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise UnavailableError(f"{command[0]} failed: {message}")

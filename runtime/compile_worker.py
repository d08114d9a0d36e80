"""The process in which grammars are compiled for the first time: lines of JSON in, lines of JSON out.

First line in: a vocabulary's recipe; every other one: a grammar. Each is answered by {"problem": text or null}.
"""

from __future__ import annotations

import json
import resource
import sys
import time

from .errors import InvalidRequest
from .grammar import Vocabulary

MAX_MEMORY = 4 * 2**30  # of address space: a large vocabulary takes a few hundred MiB of it
# What the engine will spend on compiling it again, between two steps; CPU time, so a busy machine refuses no one.
MAX_CPU_S = 1.0


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    lines = iter(sys.stdin.buffer.readline, b"")
    vocabulary = _vocabulary(next(lines, b""))
    if vocabulary is None:
        return
    for line in lines:
        _answer(_problem(vocabulary, json.loads(line)))


def _vocabulary(recipe: bytes) -> Vocabulary | None:
    try:
        vocabulary = Vocabulary(recipe.decode())
    except InvalidRequest as error:
        _answer(str(error))
        sys.stdin.buffer.read()  # stay for the asker to read this
        return None
    _answer(None)
    return vocabulary


def _problem(vocabulary: Vocabulary, source: str) -> str | None:
    start = time.process_time()
    try:
        vocabulary.compile(source)
    except InvalidRequest as error:
        return str(error)
    seconds = time.process_time() - start
    if seconds > MAX_CPU_S:
        return f"the output's grammar takes {seconds:.1f} s to compile; at most {MAX_CPU_S:g} s are allowed"
    return None


def _answer(problem: str | None) -> None:
    sys.stdout.write(json.dumps({"problem": problem}) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

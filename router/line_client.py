"""Station 7's end of the line: one connection to each replica, all generations over it.

Ray Serve places, watches and restarts replicas; `find` asks it where they listen. A replica whose connection breaks, or
that says nothing for `silence_s`, is lost with every generation on it, and looked for at once. One that said goodbye
before is not lost: it has left, and what it had not finished was handed over. It is released as soon as another one is
ready for what comes new; until then it takes that, too, so that nobody is refused while one replaces the other.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections import Counter
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping

import msgspec

from ..runtime.blocks import Changes
from ..runtime.errors import ShoalError, TooLarge, Unavailable
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.stats import Stats
from .backend import ModelInfo, ReplicaLeft, ReplicaLost, ReplicaState, check_ready, error_of
from .ledger import Ledger
from .line import (
    Abort,
    Beat,
    Begun,
    Cached,
    Events,
    Failed,
    FromReplica,
    Goodbye,
    LineError,
    LineLimits,
    Queue,
    Recite,
    Release,
    Submit,
    Welcome,
    Wire,
    family_of,
    ingress_handshake,
    set_socket,
)
from .line_stream import Stream
from .prefix_index import PrefixIndex

logger = logging.getLogger("shoal.router")

NONE_YET_S = 0.1  # between two searches while no replica is connected,
MISSING_S = 1.0  # while one is missing,
SETTLED_S = 5.0  # and otherwise, for those that are new
_encode = msgspec.msgpack.Encoder().encode


class Address(msgspec.Struct, frozen=True):
    """Where a replica listens: a numeric address and a port."""

    replica: str
    host: str
    port: int


Find = Callable[[], Awaitable[Iterable[Address]]]


class LineBackend:
    """A `Backend` over connections to replicas. `start` and all else belong to one event loop.

    find: every replica there is, as far as it is known; may fail. index: is told what they have cached, and what they
    are sent. on_silent: called with the id of a replica that was cut for its silence, which may live and hold what
    others need; must not block.
    """

    def __init__(
        self,
        find: Find,
        *,
        secret: bytes,
        limits: LineLimits | None = None,
        rng: random.Random | None = None,
        index: PrefixIndex | None = None,
        on_silent: Callable[[str], None] | None = None,
    ) -> None:
        self._find = find
        self._index = index or PrefixIndex(secret=b"")
        self._on_silent = on_silent
        self._secret = secret
        self._limits = limits or LineLimits()
        self._rng = rng or random.Random()
        self._links: dict[str, _Link] = {}
        self._digest: str | None = None  # of the model that newcomers are for; None: whatever there is
        self.queue: Callable[[], Queue] = Queue  # who waits here for a place: replicas are told, and report it
        self._is_retired = False  # no newcomers
        self._num_wanted = 1  # replicas that were there; fewer, and one is missing
        self._break = asyncio.Event()
        self._searching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Look for replicas from now on."""
        self._searching = asyncio.get_running_loop().create_task(self._search())

    def use(self, digest: str) -> None:
        """Newcomers are for that model from now on: where replicas serve another one, too, only those take its work."""
        self._digest = digest
        self._release()

    def retire(self) -> None:
        """Nothing new comes: a replica that is to go need not wait for another one."""
        self._is_retired = True
        self._release()

    async def close(self) -> None:
        """Leave every replica; what runs there for us is aborted. Idempotent."""
        if self._searching is not None:
            self._searching.cancel()
            await asyncio.wait([self._searching])
        links, self._links = self._links, {}
        for link in links.values():
            link.wire.cut("this ingress closed")
        await asyncio.sleep(0)  # connections close in the loop's next turn

    # Backend

    async def generate(
        self, request: GenerationRequest, replica: str | None = None
    ) -> AsyncGenerator[list[TokenEvent], None]:
        link = self._choose(replica, request.digest)
        stream = link.submit(request)
        try:
            while True:
                events = await stream.take()
                yield events
                if events[-1].finish_reason is not None:
                    return
        finally:
            link.leave(stream)

    async def info(self) -> ModelInfo:
        links = list(self._links.values())
        if not links:
            raise Unavailable("not ready: no replica is connected")
        infos = [link.welcome.info for link in [link for link in links if link.stays] or links]
        most = Counter(info.digest for info in infos)
        return max(infos, key=lambda info: (most[info.digest], info.created))

    async def ready(self) -> None:
        check_ready(self.replicas())

    async def stats(self) -> Mapping[str, Stats]:
        return {replica: link.beat.status.stats for replica, link in self._links.items()}

    def replicas(self) -> Mapping[str, ReplicaState]:
        return {replica: link.state() for replica, link in self._links.items()}

    def _choose(self, replica: str | None, digest: str) -> _Link:
        """Raises Unavailable: no replica of that model, or not the one that was chosen."""
        if replica is not None:
            if replica not in self._links:
                raise Unavailable("the replica was gone before it began")
            return self._links[replica]
        links = list(self._links.values())
        if not links:
            raise Unavailable("no replica is connected")
        links = [link for link in links if not digest or link.digest in ("", digest)]
        if not links:
            raise Unavailable("no replica serves the version of the model that the request came for")
        staying = [link for link in links if not link.is_leaving]  # in trouble, they may take it all the same
        return self._rng.choice([link for link in links if link.problem is None] or staying or links)

    # Connections

    async def _search(self) -> None:
        while True:
            self._break.clear()
            await asyncio.gather(*map(self._connect, await self._addresses()))
            missing = MISSING_S if len(self._links) < self._num_wanted else SETTLED_S
            try:
                async with asyncio.timeout(NONE_YET_S if self._all_leave() else missing):
                    await self._break.wait()
            except TimeoutError:
                continue

    def _all_leave(self) -> bool:
        return all(link.is_leaving for link in self._links.values())

    def _release(self) -> None:
        """Let those go that said goodbye, once another one is ready for what comes new, or nothing new comes."""
        ready = {link.digest for link in self._links.values() if link.stays}
        for link in self._links.values():
            if link.is_leaving and (self._is_retired or (self._digest or link.digest) in ready):
                link.release(is_last=link.digest not in ready)

    def _turned(self, link: _Link) -> None:
        """It said how it is, or goodbye."""
        link.wire.send([self.queue()])
        self._release()
        if link.is_leaving and self._all_leave():
            self._break.set()

    async def _addresses(self) -> list[Address]:
        try:
            found = {address.replica: address for address in await self._find()}
            return [address for replica, address in found.items() if replica not in self._links]
        except Exception as error:  # noqa: BLE001 - Serve is asked again, whatever it was
            logger.debug("no addresses of replicas: %s", type(error).__name__)
            return []

    async def _connect(self, address: Address) -> None:
        link = _Link(address.replica, self._index, limits=self._limits, on_turn=self._turned, on_close=self._closed)
        try:
            async with asyncio.timeout(self._limits.handshake_s):
                await link.connect(address.host, address.port, self._secret)
            if not link.wire.is_open:
                raise LineError("it broke at once")
        except Exception as error:  # noqa: BLE001 - whatever it was, the search goes on
            link.wire.cut("given up")
            logger.warning("no line to replica %s: %s", address.replica, error or type(error).__name__)
            return
        self._links[address.replica] = link
        self._release()
        self._num_wanted = max(self._num_wanted, len(self._links))

    def _closed(self, link: _Link, reason: str) -> None:
        if link not in self._links.values():  # it never came so far
            return
        del self._links[link.welcome.replica]
        if link.is_leaving:
            self._num_wanted = max(1, self._num_wanted - 1)
        else:
            logger.warning("lost replica %s: %s", link.welcome.replica, reason)
        if link.is_silent and self._on_silent is not None:
            self._on_silent(link.welcome.replica)
        self._break.set()


class _Link:
    """One connection to one replica. `welcome` and `beat` are there once `connect` has returned."""

    def __init__(
        self,
        replica: str,
        index: PrefixIndex,
        *,
        limits: LineLimits,
        on_turn: Callable[[_Link], None],
        on_close: Callable[[_Link, str], None],
    ) -> None:
        self.replica = replica
        self.wire: Wire
        self.welcome: Welcome
        self.beat: Beat
        self.is_leaving = False
        self.is_released = False
        self._is_last = False  # as it was told
        self.is_silent = False
        self._limits = limits
        self._on_turn = on_turn
        self._on_close = on_close
        self._streams: dict[int, Stream] = {}
        self._num_submitted = 0
        self._index = index
        self._ledger = Ledger(replica, index)
        self._num_told = 0  # what the replica has said of its cache
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[None] = self._loop.create_future()
        self._watch: asyncio.TimerHandle | None = None

    async def connect(self, host: str, port: int, secret: bytes) -> None:
        """Raises OSError, LineError."""
        self.wire = Wire(self, ingress_handshake(secret), hears=FromReplica, limits=self._limits)
        sock = socket.socket(family_of(host))
        try:
            set_socket(sock, self._limits)
            await self._loop.sock_connect(sock, (host, port))
        except BaseException:
            sock.close()
            raise
        await self._loop.create_connection(lambda: self.wire, sock=sock)
        await self._ready

    def submit(self, request: GenerationRequest) -> Stream:
        """Raises TooLarge."""
        self._num_submitted += 1
        stream = Stream(self._num_submitted, has_begun=not request.trial)
        try:
            self.wire.send([Submit(stream.id, _encode(request))])
        except LineError as error:
            raise TooLarge(f"the request is too large: {error}") from None
        self._streams[stream.id] = stream
        self._ledger.sent(stream.id, request)
        return stream

    def leave(self, stream: Stream) -> None:
        """Nobody takes the stream's events any more."""
        self._streams.pop(stream.id, None)
        self._ledger.ended(stream.id)
        if not stream.ended and self.wire.is_open:
            self.wire.send([Abort(stream.id)])

    def release(self, *, is_last: bool) -> None:
        """Nothing new comes over this line. is_last: nobody else can go on with what runs there."""
        if not self.is_released or is_last != self._is_last:
            self.is_released, self._is_last = True, is_last
            self.wire.send([Release(is_last)])

    @property
    def digest(self) -> str:
        return self.welcome.info.digest

    @property
    def stays(self) -> bool:
        """Whether it takes work, and is not about to go."""
        return not self.is_leaving and self.problem is None

    @property
    def problem(self) -> str | None:
        """Why this replica takes no work; None where it does."""
        if self.is_released:
            return "the replica is draining"
        if self._loop.time() - self.wire.heard_at > 4 * self._limits.beat_s:
            return "the replica does not answer"
        return self.beat.status.problem

    def state(self) -> ReplicaState:
        return ReplicaState(
            problem=self.problem,
            stats=self.beat.status.stats,
            ranks=self.beat.status.ranks,
            in_flight=len(self._streams),
            **self._ledger.corrections(),
            heard_s=self._loop.time() - self.wire.heard_at,
            digest=self.digest,
            is_leaving=self.is_leaving,
        )

    # Party

    def opened(self) -> None:
        self._watch = self._loop.call_later(self._limits.silence_s, self._check_silence, self._due())

    def heard(self, message: FromReplica) -> None:
        if isinstance(message, Events):
            self._ledger.answered(message.stream)
            stream = self._streams.get(message.stream)  # it may have been left a moment ago
            if stream is not None and message.events:
                stream.push(message.events)
        elif isinstance(message, Beat):
            self._heard_beat(message)
        elif isinstance(message, Cached):
            self._heard_cached(message)
        elif isinstance(message, Begun):
            if message.stream in self._streams:
                self._streams[message.stream].has_begun = True
        elif isinstance(message, Failed):
            stream = self._streams.get(message.stream)
            if stream is not None:
                stream.fail(error_of(message.failure))
        elif isinstance(message, Welcome):
            self._heard_welcome(message)
        elif isinstance(message, Goodbye):
            self.is_leaving = True
            self._on_turn(self)

    def closed(self, reason: str) -> None:
        if self._watch is not None:
            self._watch.cancel()
        self._index.leave(self.replica)
        if not self._ready.done():
            self._ready.set_exception(LineError(reason))
            return
        self._on_close(self, reason)
        for stream in self._streams.values():
            if not stream.ended:
                stream.fail(self._end_of(stream))

    def _end_of(self, stream: Stream) -> ShoalError:
        if not stream.has_begun:
            return Unavailable("the replica was gone before it began")
        if self.is_leaving and not self.is_silent:
            return ReplicaLeft("the replica has left before the answer's end")
        return ReplicaLost("the replica was lost before the answer's end")

    def _heard_welcome(self, welcome: Welcome) -> None:
        if welcome.replica != self.replica:
            raise LineError(f"replica {welcome.replica!r:.80} answers there")
        self.welcome = welcome
        self._index.join(self.replica, block_size=welcome.info.block_size)

    def _heard_cached(self, cached: Cached) -> None:
        if cached.number != self._num_told + 1 and not cached.changes.anew:
            self._index.hear(self.replica, Changes(True, b"", b""))  # nothing rather than what is no longer true
            self.wire.send([Recite()])
        self._num_told = cached.number
        self._index.hear(self.replica, cached.changes)

    def _heard_beat(self, beat: Beat) -> None:
        self.beat = beat
        self._ledger.beat(beat.received)
        if self._ready.done():
            self._on_turn(self)
        else:
            self._ready.set_result(None)

    def _due(self) -> float:
        return self._loop.time() + self._limits.silence_s

    def _check_silence(self, due: float) -> None:
        now, heard_at = self._loop.time(), self.wire.heard_at
        # Called late, it was this process that stood still, and what came meanwhile is still to be read.
        if now - heard_at >= self._limits.silence_s and now - due < self._limits.beat_s:
            self.is_silent = True
            self.wire.cut(f"silent for {now - heard_at:.1f} s")
            return
        rest = max(self._limits.beat_s, heard_at + self._limits.silence_s - now)
        self._watch = self._loop.call_later(rest, self._check_silence, now + rest)

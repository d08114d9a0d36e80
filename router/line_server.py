"""Station 8's end of the line: a listener on the node's own address, and the generations of every ingress behind it.

Whatever becomes ready in one turn of the event loop leaves in one write to each ingress. One that does not keep up
holds up nobody: what it leaves unread is buffered, and it is cut after `silence_s` or at `max_backlog`. A connection
that ends takes its generations with it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import AsyncGenerator, Callable
from contextlib import AsyncExitStack, aclosing
from functools import partial

import msgspec

from ..runtime.blocks import Changes
from ..runtime.errors import EngineError, InvalidRequest, ShoalError
from ..runtime.generation import GenerationRequest, TokenEvent
from .backend import Failure, Status, failure_of
from .line import (
    Abort,
    Beat,
    Begun,
    Cached,
    Events,
    Failed,
    FromIngress,
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
    replica_handshake,
    set_socket,
)
from .prefix_index import Catalogue

logger = logging.getLogger("shoal.router")

MAX_STRANGERS = 64  # connections without a proof so far; more are refused, so that they cost nothing
_decode_request = msgspec.msgpack.Decoder(GenerationRequest).decode

Generate = Callable[[GenerationRequest], AsyncGenerator[list[TokenEvent], None]]


class LineServer:
    """Serves `generate` to whoever knows the secret. All methods belong to one event loop.

    status, changes: asked for with every heartbeat: how things stand, and what the cache has gained and lost since.
    """

    def __init__(
        self,
        generate: Generate,
        *,
        secret: bytes,
        welcome: Welcome,
        status: Callable[[], Status],
        changes: Callable[[], list[Changes]] = list,
        limits: LineLimits | None = None,
    ) -> None:
        self.generate = generate
        self.welcome = welcome
        self.status = status
        self.catalogue = Catalogue()
        self._changes = changes
        self.limits = limits or LineLimits()
        self.court = asyncio.Lock()  # of the one suspect that is tried here; others wait in the order they came
        self._secret = secret
        self._peers: dict[_Peer, None] = {}  # in the order in which they came
        self._server: asyncio.Server | None = None
        self._beating: asyncio.Task[None] | None = None
        self.is_leaving = False
        self.lingers = True  # on its leave, for what may come while nobody else is ready; else until nothing runs
        self._released = asyncio.Event()

    async def start(self, host: str) -> int:
        """Listen on `host`, a numeric address of this machine; returns the port."""
        sock = socket.create_server((host, 0), family=family_of(host))
        set_socket(sock, self.limits)  # accepted sockets have what the listening one has
        self._server = await asyncio.get_running_loop().create_server(self._accept, sock=sock)
        self._beating = asyncio.create_task(self._beat())
        port: int = sock.getsockname()[1]
        return port

    @property
    def queue(self) -> Queue:
        """What waits at all ingresses for a place."""
        queues = [peer.queue for peer in self._peers]
        return Queue(sum(queue.count for queue in queues), max((queue.longest_s for queue in queues), default=0.0))

    def goodbye(self) -> None:
        """Tell the ingresses that this replica is to go. What runs goes on, and so may what only it can take."""
        self.is_leaving = True
        for peer in self._peers:
            peer.post(Goodbye())
        self.check_released()

    async def released(self) -> None:
        """Returns when no ingress sends anything more: each has another replica, or is gone. Behind `goodbye`."""
        await self._released.wait()

    @property
    def holds_last(self) -> bool:
        """Whether something runs here that no other replica could go on with."""
        return any(peer.is_last_resort and peer.runs for peer in self._peers)

    @property
    def is_busy(self) -> bool:
        return any(peer.runs for peer in self._peers)

    def release(self) -> None:
        """Wait for no ingress's leave: nothing more can be taken."""
        self._released.set()

    def check_released(self) -> None:
        if not self.is_leaving:
            return
        is_free = not self.lingers and not self.is_busy
        if is_free or all(peer.has_released for peer in self._peers if peer.wire.is_open):
            self._released.set()

    async def close(self, grace_s: float = 0.0) -> None:
        """Wait `grace_s` for what runs to end, and close every connection once all is sent. Idempotent."""
        if self._server is not None:
            self._server.close()
        runs = [run for peer in self._peers for run in peer.runs.values()]
        if runs and grace_s:
            await asyncio.wait(runs, timeout=grace_s)
        if self._beating is not None:
            self._beating.cancel()
        for peer in list(self._peers):
            peer.end()

    def left(self, peer: _Peer) -> None:
        self._peers.pop(peer, None)
        self.check_released()

    def _accept(self) -> Wire:
        peer = _Peer(self)
        peer.wire = Wire(peer, replica_handshake(self._secret), hears=FromIngress, limits=self.limits)
        strangers = [other for other in self._peers if not other.wire.is_open]
        if len(strangers) >= MAX_STRANGERS:
            strangers[0].wire.cut("too many strangers")
        self._peers[peer] = None
        return peer.wire

    async def _beat(self) -> None:
        while True:
            status = self.status()
            news = [part for changes in self._changes() for part in self.catalogue.hear(changes)]
            for peer in list(self._peers):
                peer.tell(news)
                peer.post(Beat(status, peer.received))
            await asyncio.sleep(self.limits.beat_s)


class _Peer:
    """One ingress. Invariant: a stream of its numbers ends with one terminal message, or the connection does."""

    def __init__(self, server: LineServer) -> None:
        self.wire: Wire
        self.received = 0  # the last stream submitted
        self.has_released = False
        self.is_last_resort = False  # nobody else can go on with what runs here
        self.queue = Queue()
        self.runs: dict[int, asyncio.Task[None]] = {}
        self._num_told = 0
        self._server = server
        self._outbox: list[FromReplica] = []
        self._flush_is_due = False
        self._loop = asyncio.get_running_loop()

    def post(self, message: FromReplica) -> None:
        """Send it with all else that this turn of the loop brings."""
        if not self.wire.is_open:
            return
        self._outbox.append(message)
        if not self._flush_is_due:
            self._flush_is_due = True
            self._loop.call_soon(self._flush)

    def tell(self, news: list[Changes]) -> None:
        """What the cache has gained and lost, to who has heard all that was before."""
        for changes in news:
            self._num_told += 1
            self.post(Cached(self._num_told, changes))

    def end(self) -> None:
        self._flush()
        self.wire.end()

    # Party

    def opened(self) -> None:
        self.post(self._server.welcome)
        self.tell(self._server.catalogue.recite())
        self.post(Beat(self._server.status(), 0))
        if self._server.is_leaving:
            self.post(Goodbye())

    def heard(self, message: FromIngress) -> None:
        if isinstance(message, Abort):
            run = self.runs.get(message.stream)
            if run is not None:
                run.cancel()
            return
        if isinstance(message, Recite):
            self.tell(self._server.catalogue.recite())
            return
        if isinstance(message, Release):
            self.has_released, self.is_last_resort = True, message.is_last
            self._server.check_released()
            return
        if isinstance(message, Queue):
            self.queue = message
            return
        if message.stream <= self.received:
            raise LineError(f"stream {message.stream} behind stream {self.received}")
        self.received = message.stream
        run = self._loop.create_task(self._run(message))
        self.runs[message.stream] = run
        run.add_done_callback(partial(self._over, message.stream))

    def closed(self, reason: str) -> None:
        logger.info("an ingress left the line: %s", reason)
        self._server.left(self)
        self._outbox = []
        for run in self.runs.values():
            run.cancel()

    def _flush(self) -> None:
        self._flush_is_due = False
        outbox, self._outbox = self._outbox, []
        if not outbox:
            return
        try:
            self.wire.send(outbox)
        except LineError:
            self._send_what_fits(outbox)

    def _send_what_fits(self, outbox: list[FromReplica]) -> None:
        """A message over the limit fails its own stream and no other."""
        for message in outbox:
            try:
                self.wire.send([message])
            except LineError as error:
                assert isinstance(message, Events)
                run = self.runs.get(message.stream)
                if run is not None:
                    run.cancel()
                self.wire.send([Failed(message.stream, failure_of(EngineError(f"the answer is too large: {error}")))])

    def _over(self, stream: int, run: asyncio.Task[None]) -> None:
        self.runs.pop(stream, None)
        self._server.check_released()
        if not run.cancelled() and (error := run.exception()) is not None:
            logger.error("unexpected %s in a replica", type(error).__name__, exc_info=error)
            text = "internal error in the replica; its log has it"
            self.post(Failed(stream, Failure(kind=EngineError.__name__, message=text)))

    async def _run(self, submit: Submit) -> None:
        """One generation. Cancelling it aborts the generation within a step."""
        stream, ended = submit.stream, False
        try:
            request = _decode_request(submit.request)
            events = self._try(stream, request) if request.trial else self._server.generate(request)
            async with aclosing(events) as batches:
                async for batch in batches:
                    ended = batch[-1].finish_reason is not None
                    self.post(Events(stream, batch))
            if not ended:
                raise EngineError("the engine ended the log without a finish reason")
        except msgspec.MsgspecError as error:
            self.post(Failed(stream, failure_of(InvalidRequest(f"the replica cannot read the request: {error}"))))
        except ShoalError as error:
            self.post(Failed(stream, failure_of(error)))

    async def _try(self, stream: int, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """A suspect's events.

        An ingress tries one at a time and knows nothing of the others' suspects. They wait here for each other, so that
        whoever ends the replica is the only one of them that had begun.
        """
        num_tokens = 0
        async with AsyncExitStack() as trial, aclosing(self._server.generate(request)) as batches:
            await trial.enter_async_context(self._server.court)
            self.post(Begun(stream))
            self._flush()  # ahead of whatever the generation may do to this process
            async for batch in batches:
                yield batch
                num_tokens += sum(len(event.tokens) for event in batch)
                if num_tokens >= request.trial:
                    await trial.aclose()

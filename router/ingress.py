"""Station 2: the path of a request, each line the next station. HTTP lives above (`api.py`), tokens below."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable

import msgspec

from ..runtime.errors import NotFound, Unavailable
from ..runtime.generation import TokenEvent
from ..runtime.text import Text
from .admission import Admission
from .auth import Keys, keys_of
from .backend import Backend, ModelInfo
from .balance import AnyReplica, Balancer
from .cache import Caching, NoCache, Reading, ResponseCache
from .config import RouterConfig
from .flight import Flight
from .metrics import RouterMetrics
from .prepare import Job, Preparer
from .resume import Resume
from .schema import Body, ChatRequest, CompletionRequest, SamplingBody
from .tenant import Tenant
from .text import Choice


class Launch(msgspec.Struct, frozen=True):
    """An admitted request: what was asked, as its logs, and the flight that brings the answer."""

    id: str
    job: Job
    flight: Flight


class Ingress:
    """The router of one process. Everything that varies is handed in; it is closed until a replica has answered.

    clock: for admission alone.
    """

    def __init__(
        self,
        backend: Backend,
        config: RouterConfig,
        *,
        cache: ResponseCache | None = None,
        balancer: Balancer | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.config = config
        self.cache: ResponseCache = cache or NoCache()
        self.balancer: Balancer = balancer or AnyReplica()
        self.keys: Keys = keys_of(config)
        self.admission = Admission(config.max_in_flight, clock=clock)
        self.metrics = RouterMetrics()
        self._resume = Resume(backend, self.balancer, config=config, meter=self.metrics.resume)
        self.metrics.in_flight.set_function(lambda: self.admission.in_flight)
        self._served: tuple[ModelInfo, Text] | None = None
        self._flights: set[Flight] = set()
        self._scraping = asyncio.Lock()

    def open(self, info: ModelInfo, text: Text) -> None:
        """Take requests from now on. info: what a replica says it serves. text: that model's tokenizer and template."""
        self._served = info, text

    def served(self) -> tuple[ModelInfo, Text]:
        """What `open` was given. Raises Unavailable before."""
        if self._served is None:
            raise Unavailable("not ready: the replica is still loading")
        return self._served

    @property
    def info(self) -> ModelInfo:
        return self.served()[0]

    @property
    def text(self) -> Text:
        return self.served()[1]

    async def chat(self, body: ChatRequest, tenant: Tenant) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        prepare = self.preparer(body)
        id = f"chatcmpl-{uuid.uuid4().hex}"
        return self._launch(await prepare.chat(body, id=id, tenant=self._salt(body, tenant)), id)

    async def completion(self, body: CompletionRequest, tenant: Tenant) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        prepare = self.preparer(body)
        id = f"cmpl-{uuid.uuid4().hex}"
        return self._launch(await prepare.completion(body, id=id, tenant=self._salt(body, tenant)), id)

    def preparer(self, body: Body) -> Preparer:
        """Raises NotFound: the body asks for a model that we do not serve."""
        self.check_model(body.model)
        return Preparer(self.text, self.info, self.config)

    async def ready(self) -> None:
        """Raises Unavailable, with the reason, unless a replica can take work now."""
        if self.admission.draining:
            raise Unavailable("the server is draining", retry_after=1.0)
        await self.backend.ready()

    @property
    def names(self) -> tuple[str, ...]:
        """What clients may call the model."""
        return self.config.served_model_name or (self.info.model,)

    def check_model(self, name: str) -> None:
        if name not in self.names:
            raise NotFound(
                f"the model {name!r:.80} does not exist; this server serves {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )

    async def scrape(self) -> bytes:
        """Prometheus text: this process and all replicas."""
        async with self._scraping:  # answers that overtake each other would look like a replica that started anew
            return self.metrics.render(await self.backend.stats())

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs go on for `timeout_s`, then end it with a terminal event each."""
        self.admission.drain()
        deadline = time.monotonic() + timeout_s
        while self._flights and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for flight in list(self._flights):
            flight.fail(Unavailable("the server is shutting down before the answer's end", retry_after=1.0))

    def _launch(self, job: Job, id: str) -> Launch:
        arrived = time.monotonic()
        choices = [Choice(i, request, self.text.output(request.params)) for i, request in enumerate(job.requests)]
        ticket = self.admission.enter(len(choices))

        def landed(choice: Choice, event: TokenEvent) -> None:
            self.metrics.landed(choice, event, arrived)

        def ended() -> None:
            ticket.close()
            self._flights.discard(flight)
            self.metrics.e2e.observe(time.monotonic() - arrived)

        def read(choice: Choice) -> Reading:
            return self.cache.open(choice.request, self._resume.follow, Caching())

        flight = Flight(choices, read, on_event=landed, on_end=ended)
        self._flights.add(flight)
        flight.start()
        return Launch(id, job, flight)

    def _salt(self, body: SamplingBody, tenant: Tenant) -> str:
        return (
            tenant.salt if body.cache_salt is None else self.keys.salt(tenant.salt.encode(), body.cache_salt.encode())
        )

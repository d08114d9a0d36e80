"""Station 2: the path of a request, each line the next station. HTTP lives above (`api.py`), tokens below."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import Callable, Sequence

import msgspec

from ..runtime.errors import InvalidRequest, NotFound, Unavailable
from ..runtime.generation import TokenEvent
from ..runtime.text import Text
from .admission import Admission
from .auth import Keys, keys_of
from .backend import Backend, ModelInfo
from .balance import AnyReplica, Balancer
from .cache import CacheMode, CacheStatus, Caching, NoCache, Reading, ResponseCache
from .config import RouterConfig
from .flight import Flight
from .headers import CACHE, CACHE_AGE, DEGRADED, IDEMPOTENCY_KEY, LAST_EVENT_ID, Asks
from .metrics import RouterMetrics
from .prepare import Job, Preparer
from .resume import Resume
from .schema import Body, ChatRequest, CompletionRequest, SamplingBody
from .tenant import Tenant
from .text import Choice

SHARED_SCOPE = "shared"  # no salt looks like it


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted request: what was asked, as its logs, and the flight that brings the answer.

    id: of the answer. degraded: what was given less of under load, as its header says it; None where nothing was.
    """

    id: str
    job: Job
    flight: Flight
    degraded: str | None = None

    def headers(self) -> dict[str, str]:
        """Of the answer, once its first pieces are there."""
        status, age_s = self.flight.origin()
        headers = {CACHE: status.value}
        if status is CacheStatus.HIT:
            headers[CACHE_AGE] = str(int(age_s))
        return headers if self.degraded is None else headers | {DEGRADED: self.degraded}


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

    def open(self, info: ModelInfo, text: Text, *, cache: ResponseCache | None = None) -> None:
        """Take requests from now on. info: what a replica says it serves. text: that model's tokenizer and template.

        cache: of that model's answers.
        """
        self.cache = cache or self.cache
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

    async def chat(self, body: ChatRequest, tenant: Tenant, asks: Asks) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        prepare = self.preparer(body)
        job = await prepare.chat(body, id=uuid.uuid4().hex, tenant=self._salt(body, tenant))
        id = f"chatcmpl-{self._answer_id(tenant, asks)}"
        return self._launch(job, id, self._caching(body, tenant, asks), received=_received(job, body, asks))

    async def completion(self, body: CompletionRequest, tenant: Tenant, asks: Asks) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        prepare = self.preparer(body)
        job = await prepare.completion(body, id=uuid.uuid4().hex, tenant=self._salt(body, tenant))
        id = f"cmpl-{self._answer_id(tenant, asks)}"
        return self._launch(job, id, self._caching(body, tenant, asks), received=_received(job, body, asks))

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

    def _launch(self, job: Job, id: str, caching: Caching, *, received: Sequence[int]) -> Launch:
        arrived = time.monotonic()
        choices = [
            Choice(i, request, self.text.output(request.params), received=had)
            for i, (request, had) in enumerate(zip(job.requests, received, strict=True))
        ]
        ticket = self.admission.enter(len(choices))

        def landed(choice: Choice, event: TokenEvent) -> None:
            self.metrics.landed(choice, event, arrived)

        def ended() -> None:
            ticket.close()
            self._flights.discard(flight)
            self.metrics.e2e.observe(time.monotonic() - arrived)

        def read(choice: Choice) -> Reading:
            return self.cache.open(choice.request, self._resume.follow, _of_choice(caching, choice.index))

        flight = Flight(choices, read, on_event=landed, on_end=ended)
        self._flights.add(flight)
        flight.start()
        return Launch(id=id, job=job, flight=flight)

    def _answer_id(self, tenant: Tenant, asks: Asks) -> str:
        """The same whenever the request is sent again under its key."""
        if asks.idempotency_key is None:
            return uuid.uuid4().hex
        return self.keys.salt(tenant.salt.encode(), b"answer", asks.idempotency_key.encode())[:32]

    def _caching(self, body: SamplingBody, tenant: Tenant, asks: Asks) -> Caching:
        """What `body` may be answered from. What is neither looked up nor stored can be continued all the same."""
        mode = asks.cache or CacheMode.AUTO
        if self.config.cache_mode == "off":
            mode = CacheMode.BYPASS
        is_reproducible = body.temperature == 0 or body.seed is not None or self.config.cache_mode == "all"
        idempotency = None
        if asks.idempotency_key is not None:
            idempotency = (asks.idempotency_key, 0)
            if mode is CacheMode.BYPASS:
                mode, is_reproducible = CacheMode.AUTO, False
        if asks.received is not None and idempotency is None and not is_reproducible:
            raise InvalidRequest(
                f"{LAST_EVENT_ID} needs the {IDEMPOTENCY_KEY} under which the request was first sent: an answer that "
                "was sampled without a seed cannot be made again",
                param=LAST_EVENT_ID,
            )
        return Caching(
            mode=mode,
            scope=SHARED_SCOPE if tenant.shares_cache and body.cache_salt is None else self._salt(body, tenant),
            is_reproducible=is_reproducible,
            idempotency=idempotency,
            resumes=asks.received is not None,
        )

    def _salt(self, body: SamplingBody, tenant: Tenant) -> str:
        return (
            tenant.salt if body.cache_salt is None else self.keys.salt(tenant.salt.encode(), body.cache_salt.encode())
        )


def _received(job: Job, body: SamplingBody, asks: Asks) -> list[int]:
    """Tokens that the client has had, of each choice. Raises InvalidRequest."""
    num_choices = len(job.requests)
    if asks.received is None:
        return [0] * num_choices
    if not body.stream:
        raise InvalidRequest(f"{LAST_EVENT_ID} needs stream: true", param=LAST_EVENT_ID)
    if len(asks.received) != num_choices:
        raise InvalidRequest(
            f"{LAST_EVENT_ID} counts the tokens of {len(asks.received)} choices; this request has {num_choices}",
            param=LAST_EVENT_ID,
        )
    return asks.received


def _of_choice(caching: Caching, index: int) -> Caching:
    if caching.idempotency is None:
        return caching
    return msgspec.structs.replace(caching, idempotency=(caching.idempotency[0], index))

"""Station 2: the path of a request, each line the next station. HTTP lives above (`api.py`), tokens below."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import aclosing
from functools import partial

import msgspec

from ..runtime.errors import InvalidRequest, NotFound, Unavailable
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.text import Text
from .admission import Admission, Grant
from .auth import Keys, keys_of
from .backend import Backend, ModelInfo
from .balance import AnyReplica, Balancer
from .cache import CacheMode, CacheStatus, Caching, NoCache, Reading, ResponseCache
from .config import RouterConfig
from .flight import Flight
from .headers import CACHE, CACHE_AGE, DEGRADED, IDEMPOTENCY_KEY, LAST_EVENT_ID, Asks
from .ladder import NOTHING, Degradation
from .metrics import RouterMetrics
from .prepare import Job, Preparer
from .rates import Rates
from .resume import Resume
from .schema import Body, ChatRequest, CompletionRequest, SamplingBody
from .store import NoStore, Store
from .tenant import Tenant
from .text import Choice

SHARED_SCOPE = "shared"  # no salt looks like it


class Launch(msgspec.Struct, frozen=True, kw_only=True):
    """An admitted request: what was asked, as its logs, and the flight that brings the answer.

    id: of the answer. degraded: what was given less of under load, as its header says it; None where nothing was.
    limits: headers that say how the tenant's rates stand.
    """

    id: str
    job: Job
    flight: Flight
    degraded: str | None = None
    limits: dict[str, str] = {}

    def headers(self) -> dict[str, str]:
        """Of the answer, once its first pieces are there."""
        status, age_s = self.flight.origin()
        headers = {CACHE: status.value, **self.limits}
        if status is CacheStatus.HIT:
            headers[CACHE_AGE] = str(int(age_s))
        return headers if self.degraded is None else headers | {DEGRADED: self.degraded}


class Ingress:
    """The router of one process. Everything that varies is handed in; it is closed until a replica has answered.

    store: where keys and rates are shared between ingresses; None where each is by itself. clock: for admission alone.
    """

    def __init__(
        self,
        backend: Backend,
        config: RouterConfig,
        *,
        cache: ResponseCache | None = None,
        balancer: Balancer | None = None,
        store: Store | None = None,
        metrics: RouterMetrics | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.config = config
        self.cache: ResponseCache = cache or NoCache()
        self.balancer: Balancer = balancer or AnyReplica()
        self.keys: Keys = keys_of(config, store, clock=clock)
        self.metrics = metrics or RouterMetrics()
        self._clock = clock
        self.admission = Admission(
            config, rates=Rates(store or NoStore(), clock=clock), meter=self.metrics.admission, clock=clock
        )
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
        prepare = self.preparer(body, given_up=self.admission.check(tenant), timeout_s=asks.timeout_s)
        job = await prepare.chat(body, id=uuid.uuid4().hex, tenant=self._as_asked(body, tenant))
        id = f"chatcmpl-{self._answer_id(tenant, asks)}"
        caching, received = self._caching(body, tenant, asks), _received(job, body, asks)
        return await self._launch(job, id, caching, received=received, tenant=tenant)

    async def completion(self, body: CompletionRequest, tenant: Tenant, asks: Asks) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        prepare = self.preparer(body, given_up=self.admission.check(tenant), timeout_s=asks.timeout_s)
        job = await prepare.completion(body, id=uuid.uuid4().hex, tenant=self._as_asked(body, tenant))
        id = f"cmpl-{self._answer_id(tenant, asks)}"
        caching, received = self._caching(body, tenant, asks), _received(job, body, asks)
        return await self._launch(job, id, caching, received=received, tenant=tenant)

    def preparer(self, body: Body, *, given_up: Degradation = NOTHING, timeout_s: float | None = None) -> Preparer:
        """Raises NotFound: the body asks for a model that we do not serve."""
        self.check_model(body.model)
        return Preparer(self.text, self.info, self.config, given_up=given_up, timeout_s=timeout_s)

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

    async def _launch(self, job: Job, id: str, caching: Caching, *, received: Sequence[int], tenant: Tenant) -> Launch:
        began = self._clock()
        outputs = [self.text.output(request.params) for request in job.requests]
        grant = await self.admission.grant(tenant, tokens=job.most_tokens())
        # Nothing below may fail: the flight closes the grant.
        for rung in job.degraded:
            self.admission.degraded(rung)
        choices = [
            Choice(i, request, output, received=had)
            for i, (request, output, had) in enumerate(zip(job.requests, outputs, received, strict=True))
        ]

        def landed(choice: Choice, event: TokenEvent) -> None:
            self.metrics.landed(choice, event, began)

        def ended() -> None:
            grant.close(flight.error)
            self._flights.discard(flight)
            self.metrics.e2e.observe(self._clock() - began)

        def read(choice: Choice) -> Reading:
            lead = partial(self._lead, tenant=tenant, grant=grant, began=began)
            return self.cache.open(choice.request, lead, _of_choice(caching, choice.index))

        flight = Flight(choices, read, on_event=landed, on_end=ended)
        self._flights.add(flight)
        flight.start()
        degraded = ", ".join(f"{what}={limit}" for what, limit in job.degraded.items()) or None
        return Launch(id=id, job=job, flight=flight, degraded=degraded, limits=grant.headers)

    async def _lead(
        self, request: GenerationRequest, *, tenant: Tenant, grant: Grant, began: float
    ) -> AsyncIterator[list[TokenEvent]]:
        """Make the log, or go on with it, once there is a place. The deadline counts from when the request came."""
        place = await self.admission.place(
            tenant, priority=request.priority, prompt_tokens=len(request.prompt), timeout_s=self._left(request, began)
        )
        grant.use(len(request.prompt))
        try:
            request = msgspec.structs.replace(request, timeout_s=self._left(request, began))
            async with aclosing(self._resume.follow(request)) as batches:
                async for batch in batches:
                    num_tokens = sum(len(event.tokens) for event in batch)
                    place.charge(num_tokens)
                    grant.use(num_tokens)
                    yield batch
        finally:
            place.close()

    def _left(self, request: GenerationRequest, began: float) -> float:
        """Seconds to the request's deadline."""
        assert request.timeout_s is not None, "every request is prepared with one"
        return max(0.001, request.timeout_s - (self._clock() - began))

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

    def _as_asked(self, body: SamplingBody, tenant: Tenant) -> Tenant:
        return msgspec.structs.replace(tenant, salt=self._salt(body, tenant))

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

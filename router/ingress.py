"""Station 2: the path of a request, each line the next station. HTTP lives above (`api.py`), tokens below."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from functools import partial
from typing import NamedTuple

import msgspec

from ..runtime.errors import InvalidRequest, NotFound, Unavailable
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.stats import Stats
from ..runtime.text import Text
from .admission import Admission, Grant
from .auth import Keys, keys_of
from .backend import Backend, ModelInfo, ReplicaState
from .balance import Balancer
from .cache import CacheMode, CacheStatus, Caching, Reading, ResponseCache
from .config import RouterConfig
from .flight import Flight
from .headers import CACHE, CACHE_AGE, DEGRADED, IDEMPOTENCY_KEY, LAST_EVENT_ID, Asks
from .ladder import NOTHING, Degradation
from .metrics import Peers, RouterMetrics, nobody
from .model import Model
from .prepare import Job, Preparer
from .rates import Rates
from .schema import Body, ChatRequest, CompletionRequest, SamplingBody
from .store import NoStore, Store
from .tenant import Tenant
from .text import Choice

SHARED_SCOPE = "shared"  # no salt looks like it


class Asked(NamedTuple):
    """A request, understood. id: of the answer."""

    id: str
    job: Job
    model: Model
    tenant: Tenant
    caching: Caching


class Launch(NamedTuple):
    """An admitted request, and the flight that brings the answer. limits: headers on how the tenant's rates stand."""

    asked: Asked
    flight: Flight
    limits: dict[str, str]

    def headers(self) -> dict[str, str]:
        """Of the answer, once its first pieces are there."""
        status, age_s = self.flight.origin()
        headers = {CACHE: status.value, **self.limits}
        if status is CacheStatus.HIT:
            headers[CACHE_AGE] = str(int(age_s))
        if degraded := self.asked.job.degraded:
            headers[DEGRADED] = ", ".join(f"{what}={limit}" for what, limit in degraded.items())
        return headers


class Ingress:
    """The router of one process. Everything that varies is handed in; it is closed until a replica has answered.

    store: where keys and rates are shared between ingresses; None where each is by itself. clock: for admission alone.
    peers: tells the other ingresses what this one has counted and returns what they tell (see `metrics.py`).
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
        peers: Peers = nobody,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.keys: Keys = keys_of(config, store, clock=clock)
        self.metrics = metrics or RouterMetrics()
        self._clock = clock
        self.admission = Admission(
            config, rates=Rates(store or NoStore(), clock=clock), meter=self.metrics.admission, clock=clock
        )
        self.model = Model(
            backend,
            names=config.served_model_name,
            balancer=balancer,
            cache=cache,
            config=config,
            meter=self.metrics.resume,
            clock=clock,
        )
        self._all = [self.model]
        self.metrics.in_flight.set_function(lambda: self.admission.in_flight)
        self.metrics.watch(self.replicas)
        self._peers = peers
        self._flights: set[Flight] = set()
        self._scraping = asyncio.Lock()

    def open(self, info: ModelInfo, text: Text, *, cache: ResponseCache | None = None) -> None:
        """Take requests for the main model from now on: see `Model.open`."""
        self.model.open(info, text, cache=cache)

    def add(self, backend: Backend, *, name: str, balancer: Balancer | None = None) -> Model:
        """One more model, which clients may ask for, and to which requests fall where a rung of the ladder says so."""
        model = Model(
            backend,
            names=[name],
            balancer=balancer,
            config=self.config,
            meter=self.metrics.resume,
            clock=self._clock,
        )
        self._all.append(model)
        return model

    def check_open(self) -> None:
        """Raises Unavailable before the main model is open."""
        _ = self.model.info

    @property
    def models(self) -> list[Model]:
        """Those that can be asked for now. Raises Unavailable before the main one is open."""
        self.check_open()
        return [model for model in self._all if model.is_open]

    def model_of(self, name: str) -> Model:
        """Raises NotFound: we do not serve it. Unavailable."""
        models = self.models
        for model in models:
            if name in model.names:
                return model
        served = ", ".join(served for model in models for served in model.names)
        raise NotFound(
            f"the model {name!r:.80} does not exist; this server serves {served}", param="model", code="model_not_found"
        )

    async def chat(self, body: ChatRequest, tenant: Tenant, asks: Asks) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        return await self._take(body, tenant, asks, kind="chatcmpl", read=partial(Preparer.chat, body=body))

    async def completion(self, body: CompletionRequest, tenant: Tenant, asks: Asks) -> Launch:
        """Raises RequestError, Unavailable: then nothing has run."""
        return await self._take(body, tenant, asks, kind="cmpl", read=partial(Preparer.completion, body=body))

    async def _take(
        self, body: SamplingBody, tenant: Tenant, asks: Asks, *, kind: str, read: Callable[..., Awaitable[Job]]
    ) -> Launch:
        """`read`: how a preparer makes a job of such a body. kind: of answer, as its id says it."""
        model, given_up = self._choose(body, tenant, asks)
        prepare = Preparer(model.text, model.info, self.config, given_up=given_up, timeout_s=asks.timeout_s)
        as_asked = msgspec.structs.replace(tenant, salt=self._salt(body, tenant))
        job = await read(prepare, id=uuid.uuid4().hex, tenant=as_asked)
        id = f"{kind}-{self._answer_id(tenant, asks)}"
        asked = Asked(id, job, model, tenant, self._caching(body, tenant, asks))
        return await self._launch(asked, received=_received(job, body, asks))

    def preparer(self, body: Body) -> Preparer:
        """Raises NotFound: the body asks for a model that we do not serve."""
        model = self.model_of(body.model)
        return Preparer(model.text, model.info, self.config)

    def _choose(self, body: SamplingBody, tenant: Tenant, asks: Asks) -> tuple[Model, Degradation]:
        """The model that answers, which under load may be a smaller one, and what else is given up.

        Nothing of what is, or may be, sent again: then it must be the same log, whatever the load is by then.

        Raises:
            NotFound: the body asks for a model that we do not serve. Unavailable: see `Admission.check`.
        """
        given_up = self.admission.check(tenant)
        if asks.idempotency_key is not None or asks.received is not None:
            given_up = NOTHING
        model = self.model_of(body.model)
        if model is self.model:
            for smaller in self.models[1:]:
                if given_up.model in smaller.names:
                    return smaller, given_up
        return model, msgspec.structs.replace(given_up, model=None)

    async def ready(self) -> None:
        """Raises Unavailable, with the reason, unless a replica can take work now."""
        if self.admission.draining:
            raise Unavailable("the server is draining", retry_after=1.0)
        await self.model.backend.ready()

    async def scrape(self) -> bytes:
        """Prometheus text: all ingresses and all replicas."""
        async with self._scraping:  # answers that overtake each other would look like a replica that started anew
            told = self.metrics.tell(await self._stats())
            return self.metrics.text(await self._peers(told))

    async def exchange(self, telling: bytes) -> bytes:
        """What another ingress has counted, for what this one has."""
        self.metrics.hear(telling)
        return self.metrics.tell(await self._stats())

    async def _stats(self) -> dict[str, Stats]:
        stats = [await model.backend.stats() for model in self._all]
        return {replica: its for of_model in stats for replica, its in of_model.items()}

    def replicas(self) -> dict[str, ReplicaState]:
        """Of all models: what is known of each replica that is connected."""
        return {replica: state for model in self._all for replica, state in model.backend.replicas().items()}

    async def drain(self, timeout_s: float) -> None:
        """Take nothing new, let what runs go on for `timeout_s`, then end it with a terminal event each."""
        self.admission.drain()
        deadline = time.monotonic() + timeout_s
        while self._flights and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for model in self._all:
            model.resume.stop()
        for flight in list(self._flights):
            flight.fail(Unavailable("the server is shutting down before the answer's end", retry_after=1.0))
        for model in self._all:
            await model.cache.close()
        await self.admission.close()

    async def _launch(self, asked: Asked, *, received: Sequence[int]) -> Launch:
        began = self._clock()
        job, model = asked.job, asked.model
        outputs = [model.text.output(request.params) for request in job.requests]
        grant = await self.admission.grant(asked.tenant, tokens=job.most_tokens())
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
            lead = partial(self._lead, asked=asked, grant=grant, told=choice.attempts.append)
            return model.cache.open(choice.request, lead, _of_choice(asked.caching, choice.index))

        flight = Flight(choices, read, on_event=landed, on_end=ended)
        self._flights.add(flight)
        flight.start()
        return Launch(asked=asked, flight=flight, limits=grant.headers)

    async def _lead(
        self,
        request: GenerationRequest,
        *,
        asked: Asked,
        grant: Grant,
        told: Callable[[str | None], None],
    ) -> AsyncIterator[list[TokenEvent]]:
        """Make the log, or go on with it, once there is a place: in the time that the request has from now."""
        assert request.timeout_s is not None, "every request is prepared with one"
        deadline = self._clock() + request.timeout_s
        with ExitStack() as stack:
            grant.open()
            stack.callback(grant.close)
            place = await self.admission.place(
                asked.tenant,
                priority=request.priority,
                prompt_tokens=len(request.prompt),
                timeout_s=request.timeout_s,
            )
            stack.callback(place.close)
            grant.use(len(request.prompt))
            request = msgspec.structs.replace(request, timeout_s=max(0.001, deadline - self._clock()))
            async with aclosing(asked.model.resume.follow(request, on_attempt=told)) as batches:
                async for batch in batches:
                    num_tokens = sum(len(event.tokens) for event in batch)
                    place.charge(num_tokens)
                    grant.use(num_tokens)
                    yield batch

    def _answer_id(self, tenant: Tenant, asks: Asks) -> str:
        """The same whenever the request is sent again under its key."""
        if asks.idempotency_key is None:
            return uuid.uuid4().hex
        return self.keys.salt(tenant.salt.encode(), b"answer", asks.idempotency_key.encode())[:32]

    def _caching(self, body: SamplingBody, tenant: Tenant, asks: Asks) -> Caching:
        """What `body` may be answered from. What is neither looked up nor stored can be continued all the same."""
        mode = asks.cache or CacheMode.AUTO
        if self.config.cache_mode == "off" and mode is not CacheMode.ONLY:
            mode = CacheMode.BYPASS
        is_reproducible = body.temperature == 0 or body.seed is not None or self.config.cache_mode == "all"
        idempotency = None
        if asks.idempotency_key is not None:
            idempotency = (asks.idempotency_key, 0)
            is_reproducible = is_reproducible and mode is not CacheMode.BYPASS
            if not is_reproducible and mode is not CacheMode.ONLY:
                mode = CacheMode.AUTO  # a second log under this name would not go on where the first one was left
        if asks.received is not None and idempotency is None and not is_reproducible:
            raise InvalidRequest(
                f"{LAST_EVENT_ID} needs the {IDEMPOTENCY_KEY} under which the request was first sent: an answer that "
                "was sampled without a seed cannot be made again",
                param=LAST_EVENT_ID,
            )
        # Keys are the tenant's own, also where it shares: another one may have hit on the same.
        is_shared = tenant.shares_cache and body.cache_salt is None and (is_reproducible or idempotency is None)
        return Caching(
            mode=mode,
            scope=SHARED_SCOPE if is_shared else self._salt(body, tenant),
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

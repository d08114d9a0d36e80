"""Station 2: the path of a request, each line the next station. HTTP lives above (`api.py`), tokens below."""

from __future__ import annotations

import asyncio
import random
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import ExitStack, aclosing
from functools import partial

import msgspec

from ..runtime.errors import EngineError, InvalidRequest, NotFound, Unavailable
from ..runtime.generation import GenerationRequest, TokenEvent
from ..runtime.stats import Stats
from ..runtime.text import Text
from .admission import Admission, Grant
from .auth import Keys, keys_of
from .backend import Backend, ModelInfo, Poison, ReplicaState
from .balance import Balancer
from .cache import CacheStatus, Reading, ResponseCache
from .config import RouterConfig
from .flight import Flight
from .headers import VARIANT, Asks
from .homes import Homes
from .ladder import NOTHING, Degradation
from .launch import Asked, Launch
from .metrics import Peers, RouterMetrics, nobody
from .model import Model
from .prepare import Job, Preparer
from .rates import Rates
from .rollback import Court, Verdict
from .rollout_config import STABLE, RolloutConfig
from .schema import Body, ChatRequest, CompletionRequest, SamplingBody
from .scopes import Scopes, of_choice, received_of
from .shadow import Shadows
from .store import NoStore, Store
from .tenant import Tenant
from .text import Choice
from .variants import Variants
from .verdicts import Bulletin


class Ingress:
    """The router of one process. Everything that varies is handed in; it is closed until a replica has answered.

    It has the main model's stable variant from the start (`backend`); other variants and further models come and go.

    store: where keys, rates and verdicts are shared between ingresses; None where each is by itself. clock: for
    admission and rollbacks. rng: for which variant. peers: tells the other ingresses what this one has counted and
    returns what they tell (see `metrics.py`).
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
        rng: random.Random | None = None,
    ) -> None:
        self.config = config
        self.keys: Keys = keys_of(config, store, clock=clock)
        self.metrics = metrics or RouterMetrics()
        self._scopes = Scopes(self.keys, config)
        self._clock = clock
        shared = store or NoStore()
        self.admission = Admission(config, rates=Rates(shared, clock=clock), meter=self.metrics.admission, clock=clock)
        self.model = self._model(backend, STABLE, names=config.served_model_name, balancer=balancer, cache=cache)
        self._further: dict[str, Model] = {}
        self._leaving: list[Model] = []
        self._court = Court(clock=clock, on_verdict=self._taken_back)
        self.variants = Variants(
            self.model,
            secret=bytes.fromhex(self.keys.salt(b"variants")),
            homes=Homes(shared, salt=self.keys.salt, config=config),
            court=self._court,
            meter=self.metrics.variants,
            rng=rng or random.Random(),
        )
        self._bulletin = Bulletin(shared, self._court, find=self.variants.get, salt=self.keys.salt)
        self._shadows = Shadows(
            self.variants.get,
            meter=self.metrics.variants,
            rng=rng or random.Random(),
            has_queue=lambda: self.admission.load > 1.0,
            logs_text=config.log_prompts,
        )
        self.metrics.in_flight.set_function(lambda: self.admission.in_flight)
        self.metrics.watch(self.replicas, self.variants.shares, lambda: [part.scale for part in self.parts])
        self._peers = peers
        self._flights: set[Flight] = set()
        self._scraping = asyncio.Lock()

    def open(self, info: ModelInfo, text: Text, *, cache: ResponseCache | None = None) -> None:
        """Take requests for the main model from now on: see `Model.open`."""
        self.model.open(info, text, cache=cache)

    def add_variant(self, name: str, backend: Backend, *, balancer: Balancer | None = None) -> Model:
        """One more variant of the main model. It gets its share from when it is open (`Model.open`), one of its
        replicas is ready and the rollout gives it one. `name` is not in use."""
        model = self._model(backend, name, names=self.model.given_names, balancer=balancer)
        self.variants.add(model)
        self._void(model)
        return model

    def add(self, backend: Backend, *, name: str, balancer: Balancer | None = None, names: Sequence[str] = ()) -> Model:
        """One more model, which clients may ask for, and to which requests fall where a rung of the ladder says so.

        name: of the part, in metrics; not in use. names: what clients call it; default: `name`.
        """
        assert self.part(name) is None, f"there is a part {name!r} already"
        model = self._further[name] = self._model(backend, name, names=names or [name], balancer=balancer)
        return model

    def part(self, name: str) -> Model | None:
        """The variant or further model of that name."""
        return self.variants.get(name) or self._further.get(name)

    def drop(self, name: str) -> Model:
        """A variant or further model gets nothing new from now on. What runs there ends there; where its replicas go
        before that, it goes on at a variant whose model's digest is equal, if there is one. Its backend is the caller's
        to close once it is `Model.unused`."""
        if name in self._further:
            model = self._further.pop(name)
        else:
            model = self.variants.drop(name)
            self._void(model)
        model.dropped = True
        self.metrics.held.forget(name)
        self._leaving.append(model)
        return model

    def roll_out(self, config: RolloutConfig) -> None:
        """Which variant answers, from the next request on; what runs, runs on. At any time, as often as one likes.

        Names without a variant are ignored until one is added. A variant that was taken back stays so until its own
        weight or the bounds are others, or it is added anew.
        """
        self.variants.roll_out(config)
        self._shadows.roll_out(config)
        self._bulletin.watch()

    def _model(
        self,
        backend: Backend,
        name: str,
        *,
        names: Sequence[str],
        balancer: Balancer | None,
        cache: ResponseCache | None = None,
    ) -> Model:
        model = Model(
            backend,
            name=name,
            names=names,
            balancer=balancer,
            cache=cache,
            config=self.config,
            meter=self.metrics.resume,
            clock=self._clock,
            twin=self._twin_of,
            on_change=self._void,
        )
        self.metrics.held.watch(name, model.sleep.held)
        return model

    def _twin_of(self, model: Model) -> Model | None:
        return self.variants.twin_of(model)

    def _void(self, variant: Model) -> None:
        """What was found of it is of another one."""
        self._court.forget(variant.name)
        self._bulletin.forget(variant.name)

    def _taken_back(self, name: str, verdict: Verdict) -> None:
        self.metrics.variants.rollbacks.labels(name, verdict.bound).inc()

    @property
    def parts(self) -> list[Model]:
        """All variants and further models."""
        return [*self.variants.members, *self._further.values()]

    @property
    def _all(self) -> list[Model]:
        """Also those that were dropped, while anything runs there."""
        self._leaving = [model for model in self._leaving if model.is_used]
        return [*self.parts, *self._leaving]

    def check_open(self) -> None:
        """Raises Unavailable before the main model is open."""
        _ = self.model.info

    @property
    def models(self) -> list[Model]:
        """Those that can be asked for now. Raises Unavailable before the main one is open."""
        self.check_open()
        return [self.model, *(model for model in self._further.values() if model.is_open)]

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

    async def chat(
        self, body: ChatRequest, tenant: Tenant, asks: Asks, *, avoid: frozenset[str] = frozenset()
    ) -> Launch:
        """avoid: variants that could not answer it. Raises RequestError, Unavailable: then nothing has run."""
        read = partial(Preparer.chat, body=body)
        return await self._take(body, tenant, asks, kind="chatcmpl", read=read, avoid=avoid)

    async def completion(
        self, body: CompletionRequest, tenant: Tenant, asks: Asks, *, avoid: frozenset[str] = frozenset()
    ) -> Launch:
        """avoid: variants that could not answer it. Raises RequestError, Unavailable: then nothing has run."""
        read = partial(Preparer.completion, body=body)
        return await self._take(body, tenant, asks, kind="cmpl", read=read, avoid=avoid)

    def may_go_elsewhere(self, launch: Launch, error: EngineError, asks: Asks, avoid: frozenset[str]) -> bool:
        """Whether a request that its variant failed, and of which nothing was sent, may go to another one.

        avoid: that variant, and those that it was with before.
        """
        is_bound = asks.variant is not None or asks.received is not None or self.admission.draining
        if is_bound or isinstance(error, Poison):
            return False
        has_failed = launch.asked.trial.has_failed or launch.flight.origin()[0] is CacheStatus.SHARED
        return has_failed and self.variants.has_other(launch.asked.model, avoid)

    async def _take(
        self,
        body: SamplingBody,
        tenant: Tenant,
        asks: Asks,
        *,
        kind: str,
        read: Callable[..., Awaitable[Job]],
        avoid: frozenset[str],
    ) -> Launch:
        """`read`: how a preparer makes a job of such a body. kind: of answer, as its id says it."""
        model, given_up = self._choose(body, tenant, asks)
        if model is self.model:
            model = await self.variants.choose(tenant, asks, user=body.user, avoid=avoid)
        elif asks.variant is not None:
            raise InvalidRequest(f"{VARIANT} is for {self.model.names[0]}; no other model has any", param=VARIANT)
        prepare = Preparer(model.text, model.info, self.config, given_up=given_up, timeout_s=asks.timeout_s)
        as_asked = msgspec.structs.replace(tenant, salt=self._scopes.salt(body, tenant))
        job = await read(prepare, id=uuid.uuid4().hex, tenant=as_asked)
        id = f"{kind}-{self._scopes.answer_id(tenant, asks)}"
        trial = self._court.trial(model.name, has_deadline=body.timeout is not None or asks.timeout_s is not None)
        asked = Asked(id, job, model, tenant, self._scopes.caching(body, tenant, asks), trial)
        return await self._launch(asked, received=received_of(job, body, asks))

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
        if not self.variants.can_answer:
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
        self._court.is_closed = True
        self._bulletin.close()
        deadline = time.monotonic() + timeout_s
        while self._flights and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for model in self._all:
            model.resume.stop()
        for flight in list(self._flights):
            flight.fail(Unavailable("the server is shutting down before the answer's end", retry_after=1.0))
        for model in self._all:
            await model.cache.close()
        await self._shadows.close()
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

        counts, using = self.metrics.part(model.name), ExitStack()
        using.enter_context(model.in_use())

        def landed(choice: Choice, event: TokenEvent) -> None:
            counts.landed(choice, event, began)

        def ended() -> None:
            grant.close(flight.error)
            asked.trial.close()
            using.close()
            self._flights.discard(flight)
            counts.e2e.observe(self._clock() - began)

        def read(choice: Choice) -> Reading:
            lead = partial(self._lead, asked=asked, grant=grant, told=choice.attempts.append)
            return model.cache.open(choice.request, lead, of_choice(asked.caching, choice.index))

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
            stack.enter_context(asked.model.in_use())
            if self.admission.load >= 1.0:
                self._shadows.shed()
            with asked.model.queue.one_more():
                place = await self.admission.place(
                    asked.tenant,
                    priority=request.priority,
                    prompt_tokens=len(request.prompt),
                    timeout_s=request.timeout_s,
                )
            stack.callback(place.close)
            grant.use(len(request.prompt))
            request = msgspec.structs.replace(request, timeout_s=max(0.001, deadline - self._clock()))
            stack.enter_context(asked.trial.log(is_timed=not asked.model.is_asleep))
            original = stack.enter_context(self._shadows.copy(request, of=asked.model.name))
            async with aclosing(asked.model.resume.follow(request, on_attempt=told)) as batches:
                async for batch in batches:
                    num_tokens = sum(len(event.tokens) for event in batch)
                    place.charge(num_tokens)
                    grant.use(num_tokens)
                    asked.trial.came(batch)
                    original.came(batch)
                    yield batch

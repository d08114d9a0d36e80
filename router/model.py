"""Between stations 2 and 7: a model, or a variant of it: where its replicas are, its text, its answers, its logs."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from ..runtime.errors import Unavailable
from ..runtime.text import Text
from .backend import Backend, ModelInfo
from .balance import AnyReplica, Balancer
from .cache import NoCache, ResponseCache
from .config import RouterConfig
from .load_report import Decided
from .meters import ResumeMeter
from .resume import Resume
from .rollout_config import STABLE
from .scaling_watch import PartScale
from .twin import Twinned, is_ready
from .waiters import Waiters
from .wake import Sleep


class Model:
    """Closed until one of its replicas has answered.

    name: of the part of the deployment that it is: in metrics, weights and headers. names: what clients may call it,
    the first one is listed first; empty: its own, once it is known. twin: what may go on with its logs, see `Twinned`.
    on_change: called when it is opened anew with another digest.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        name: str = STABLE,
        names: Sequence[str],
        balancer: Balancer | None = None,
        cache: ResponseCache | None = None,
        config: RouterConfig,
        meter: ResumeMeter,
        clock: Callable[[], float] = time.monotonic,
        twin: Callable[[Model], Model | None] = lambda model: None,
        on_change: Callable[[Model], None] = lambda model: None,
    ) -> None:
        self.backend = backend
        self.name = name
        self.cache: ResponseCache = cache or NoCache()
        self.balancer: Balancer = balancer or AnyReplica()
        reached = Twinned(backend, self.balancer, lambda: twin(self))
        self.decided: Decided | None = None  # how many replicas there are to be, where that is settled and known
        self.queue = Waiters(clock=clock)  # for a place among those that the router admits
        self.sleep = Sleep(clock=clock)  # where it may, the deployment says who wakes it (`Sleep.allow`)
        self.resume = Resume(reached, reached, config=config, meter=meter, sleep=self.sleep, clock=clock)
        self._on_change = on_change
        self.dropped = False  # nothing new comes
        self.given_names = tuple(names)
        self._served: tuple[ModelInfo, Text] | None = None
        self._num_users = 0
        self._unused = asyncio.Event()
        self._unused.set()

    def open(self, info: ModelInfo, text: Text, *, cache: ResponseCache | None = None) -> None:
        """Take requests from now on. info: what a replica says it serves. text: that model's tokenizer and template.

        cache: of that model's answers.
        """
        self.cache = cache or self.cache
        has_changed = self._served is not None and self._served[0].digest != info.digest
        self._served = info, text
        if has_changed:
            self._on_change(self)

    @property
    def is_open(self) -> bool:
        return self._served is not None

    @property
    def is_ready(self) -> bool:
        """Open, and one of its replicas takes work, or would be started for it."""
        return self.is_open and (is_ready(self.backend) or self.sleep.is_allowed)

    @property
    def is_asleep(self) -> bool:
        """Open, and who comes now waits for a replica to be started."""
        return self.is_open and self.sleep.is_allowed and not is_ready(self.backend)

    @property
    def scale(self) -> PartScale:
        """How many replicas it has, and is to have."""
        states = self.backend.replicas().values()
        num_ready = sum(state.problem is None and not state.is_leaving for state in states)
        return PartScale(self.name, num_ready, self.decided)

    @property
    def info(self) -> ModelInfo:
        """Raises Unavailable before `open`."""
        return self._opened()[0]

    @property
    def text(self) -> Text:
        """Raises Unavailable before `open`."""
        return self._opened()[1]

    @property
    def names(self) -> tuple[str, ...]:
        return self.given_names or (self.info.model,)

    @contextmanager
    def in_use(self) -> Iterator[None]:
        """Meanwhile somebody's request is with it."""
        self._num_users += 1
        self._unused.clear()
        try:
            yield
        finally:
            self._num_users -= 1
            if not self._num_users:
                self._unused.set()

    @property
    def is_used(self) -> bool:
        return self._num_users > 0

    async def unused(self) -> None:
        """Until no request is with it: then, where it was dropped, its backend may be closed."""
        await self._unused.wait()

    def _opened(self) -> tuple[ModelInfo, Text]:
        if self._served is None:
            raise Unavailable("not ready: the replica is still loading")
        return self._served

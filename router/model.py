"""Between stations 2 and 7: one model that is served. Where its replicas are, its text, its answers, its logs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from ..runtime.errors import Unavailable
from ..runtime.text import Text
from .backend import Backend, ModelInfo
from .balance import AnyReplica, Balancer
from .cache import NoCache, ResponseCache
from .config import RouterConfig
from .meters import ResumeMeter
from .resume import Resume


class Model:
    """Closed until one of its replicas has answered.

    names: what clients may call it, the first one is listed first; empty: its own, once it is known.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        names: Sequence[str],
        balancer: Balancer | None = None,
        cache: ResponseCache | None = None,
        config: RouterConfig,
        meter: ResumeMeter,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.backend = backend
        self.cache: ResponseCache = cache or NoCache()
        self.balancer: Balancer = balancer or AnyReplica()
        self.resume = Resume(backend, self.balancer, config=config, meter=meter, clock=clock)
        self._names = tuple(names)
        self._served: tuple[ModelInfo, Text] | None = None

    def open(self, info: ModelInfo, text: Text, *, cache: ResponseCache | None = None) -> None:
        """Take requests from now on. info: what a replica says it serves. text: that model's tokenizer and template.

        cache: of that model's answers.
        """
        self.cache = cache or self.cache
        self._served = info, text

    @property
    def is_open(self) -> bool:
        return self._served is not None

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
        return self._names or (self.info.model,)

    def _opened(self) -> tuple[ModelInfo, Text]:
        if self._served is None:
            raise Unavailable("not ready: the replica is still loading")
        return self._served

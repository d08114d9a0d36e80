"""A variant that fails what it is asked, through the whole application: another one answers, where nothing was sent."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

import pytest

from shoal.router.api import create_app
from shoal.router.rollout_config import STABLE
from shoal.runtime.generation import POISON, FinishReason, GenerationRequest, TokenEvent

from . import virtual_time
from .fakes import MODEL, FakeBackend, Reply
from .memory_store import MemoryStore
from .rollouts import CANARY, Service, redis, words_of
from .test_rollout_load import post


class Broken(FakeBackend):
    """Says so many tokens, and then it fails."""

    def __init__(self, num_tokens: int = 0, error: str = "the logits were not finite") -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self.error = error

    def _events(self, request: GenerationRequest) -> Iterator[TokenEvent]:
        yield from (self._event(request, i, [65 + i], None) for i in range(self.num_tokens))
        failed = self._event(request, self.num_tokens, [], FinishReason.ERROR)
        yield TokenEvent(
            id=failed.id, start=failed.start, tokens=[], finish_reason=failed.finish_reason, error=self.error
        )


def play(canary: Broken, *bodies: dict[str, Any], rollback: dict[str, Any] | None = None) -> list[Reply]:
    """What comes of them, asked at once."""

    async def scenario() -> list[Reply]:
        service = Service(store=MemoryStore(redis()))
        service.ingress.add_variant(CANARY, canary)
        service.open(CANARY)
        service.roll_out(weights={CANARY: 1}, rollback=rollback)
        app = create_app(service.ingress)
        given = {"model": MODEL, "prompt": "hi", "max_tokens": 100}
        return await asyncio.gather(*(post(app, given | body, {}) for body in bodies))

    return virtual_time.run(scenario)


@pytest.mark.parametrize("stream", [True, False])
def test_what_its_variant_fails_another_one_answers(stream: bool) -> None:
    canary = Broken()
    (reply,) = play(canary, {"stream": stream})
    assert (reply.status, reply.headers["x-shoal-variant"]) == (200, STABLE)
    said = (
        "".join(chunk["choices"][0]["text"] for chunk in reply.chunks) if stream else reply.json["choices"][0]["text"]
    )
    assert said == words_of(STABLE)
    assert len(canary.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_of_which_something_was_sent_goes_nowhere_else(stream: bool) -> None:
    """A stream has begun to say what the variant says; a whole answer has not."""
    (reply,) = play(Broken(num_tokens=2), {"stream": stream})
    if stream:
        assert b"the logits were not finite" in reply.body
    else:
        assert (reply.status, reply.headers["x-shoal-variant"]) == (200, STABLE)


def test_who_shares_an_answer_that_fails_gets_another_one() -> None:
    canary = Broken()
    canary.delay_s = 1.0
    replies = play(canary, *[{"temperature": 0}] * 5)
    assert [reply.status for reply in replies] == [200] * 5
    assert len(canary.requests) == 1


@pytest.mark.parametrize("stream", [True, False])
def test_what_ended_ranks_is_tried_nowhere_else(stream: bool) -> None:
    (reply,) = play(Broken(error=POISON), {"stream": stream})
    assert (reply.status, reply.json["error"]["message"]) == (500, POISON)


def test_nobody_fails_until_it_is_taken_back() -> None:
    canary = Broken()
    bounds = {"max_error_rate": 0.1, "min_requests": 5}
    replies = play(canary, *[{"prompt": f"{number}"} for number in range(30)], rollback=bounds)
    assert {(reply.status, reply.headers["x-shoal-variant"]) for reply in replies} == {(200, STABLE)}

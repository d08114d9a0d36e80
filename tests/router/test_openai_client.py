"""The real `openai` client against the router: its own calls, types and error classes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from shoal.router.config import RouterConfig
from shoal.runtime.errors import CacheMiss, LogLost, QueueFull, RowFailed
from shoal.runtime.generation import GenerationRequest

from .fakes import ANSWER, MODEL, Server, wait_for

HI: Any = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def running() -> Iterator[Server]:
    with Server(RouterConfig(served_model_name=(MODEL,), api_keys=("sk-test",))) as server:
        yield server


@pytest.fixture
def server(running: Server) -> Server:
    running.backend.reset()
    return running


@pytest.fixture
def client(server: Server) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=0) as connected:
        yield connected


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, temperature=0)
    assert answer.choices[0].message.content == ANSWER
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 2


def test_chat_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL, messages=HI, stream=True, stream_options={"include_usage": True}, n=2
    )
    texts, reasons, usage, ids = ["", ""], ["", ""], None, set()
    for chunk in stream:
        ids.add(chunk.id)
        usage = chunk.usage or usage
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [ANSWER, ANSWER]
    assert reasons == ["stop", "stop"]
    assert len(ids) == 1
    assert usage is not None
    assert usage.completion_tokens == 2 * (len(ANSWER) + 1)


def test_chat_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(model=MODEL, messages=HI) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_completion().choices[0].message.content == ANSWER
    assert kinds[0] == "chunk"
    assert "content.delta" in kinds
    assert kinds.count("content.done") == 1


def test_chat_logprobs(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HI, logprobs=True, top_logprobs=2, max_tokens=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [entry.token for entry in logprobs.content] == ["T", "h"]
    assert [top.token for top in logprobs.content[0].top_logprobs] == ["T", "U"]


def test_completion(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt=["a", "b"], max_tokens=5, logprobs=1, echo=True)
    assert [choice.text for choice in answer.choices] == ["aThe c", "bThe c"]
    logprobs = answer.choices[1].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["b", "T", "h", "e", " ", "c"]


def test_completion_stream(client: openai.OpenAI) -> None:
    chunks = list(client.completions.create(model=MODEL, prompt="a", max_tokens=5, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == "The c"
    assert chunks[-1].choices[0].finish_reason == "length"


def test_extras_go_through_extra_body(client: openai.OpenAI, server: Server) -> None:
    extras = {"top_k": 3, "min_p": 0.1, "structured_outputs": {"choice": ["a", "b"]}}
    client.chat.completions.create(model=MODEL, messages=HI, extra_body=extras)
    params = server.backend.requests[-1].params
    assert (params.top_k, params.min_p) == (3, 0.1)
    assert params.structured_outputs is not None
    assert params.structured_outputs.choice == ["a", "b"]


def test_structured_outputs(client: openai.OpenAI, server: Server) -> None:
    from pydantic import BaseModel

    class City(BaseModel):
        name: str

    server.backend.answer = '{"name":"Paris"}'
    answer = client.chat.completions.parse(model=MODEL, messages=HI, response_format=City)
    assert answer.choices[0].message.parsed == City(name="Paris")
    constraint = server.backend.requests[-1].params.structured_outputs
    assert constraint is not None
    assert '"name"' in str(constraint.json)


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "shoal"
    with pytest.raises(openai.NotFoundError, match="'other' does not exist"):
        client.models.retrieve("other")


def test_errors_have_their_classes(client: openai.OpenAI, server: Server) -> None:
    create: Any = client.chat.completions.create
    with pytest.raises(openai.BadRequestError, match="temperature is 101") as bad:
        create(model=MODEL, messages=HI, temperature=101)
    assert (bad.value.param, bad.value.type) == ("temperature", "invalid_request_error")
    with pytest.raises(openai.BadRequestError) as unsupported:
        create(model=MODEL, messages=HI, tools=[{"type": "function", "function": {"name": "f"}}])
    assert unsupported.value.param == "tools"
    with pytest.raises(openai.NotFoundError) as missing:
        create(model="other", messages=HI)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model=MODEL, prompt=[1] * 600)
    assert long.value.code == "context_length_exceeded"
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-wrong", max_retries=0) as stranger:
        with pytest.raises(openai.AuthenticationError) as wrong:
            stranger.models.list()
        assert wrong.value.code == "invalid_api_key"


def test_the_client_retries_when_told_to(server: Server) -> None:
    refusals = iter([QueueFull("full", retry_after=0.01)])

    def before(request: GenerationRequest, i: int) -> None:
        if error := next(refusals, None):
            raise error

    server.backend.before = before
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=1) as client:
        answer = client.chat.completions.create(model=MODEL, messages=HI)
    assert answer.choices[0].message.content == ANSWER
    assert len(server.backend.requests) == 2


@pytest.mark.parametrize(
    "error", [RowFailed("two replicas were lost while they computed it"), CacheMiss("none"), LogLost("it is gone")]
)
def test_the_client_does_not_retry_what_would_come_to_the_same(server: Server, error: Exception) -> None:
    def failing(request: GenerationRequest, i: int) -> None:
        raise error

    server.backend.before = failing
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="sk-test", max_retries=2) as client,
        pytest.raises((openai.InternalServerError, openai.ConflictError)),
    ):
        client.chat.completions.create(model=MODEL, messages=HI)
    assert len(server.backend.requests) == 1


def test_an_error_in_mid_stream_reaches_the_client(client: openai.OpenAI, server: Server) -> None:
    def before(request: GenerationRequest, i: int) -> None:
        if i == 3:
            raise RowFailed("a NaN in the logits")

    server.backend.before = before
    stream = client.chat.completions.create(model=MODEL, messages=HI, stream=True)
    with pytest.raises(openai.APIError, match="a NaN in the logits"):
        list(stream)


def test_closing_a_stream_aborts_the_generation(client: openai.OpenAI, server: Server) -> None:
    server.backend.delay_s = 0.01
    with client.chat.completions.create(model=MODEL, messages=HI, stream=True) as stream:
        next(iter(stream))
    wait_for(lambda: server.backend.live == 0, "the abort", timeout_s=0.5)
    assert server.backend.aborted == 1


@pytest.mark.anyio
async def test_the_async_client(server: Server) -> None:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="sk-test") as client:
        stream = await client.chat.completions.create(model=MODEL, messages=HI, stream=True)
        texts = [chunk.choices[0].delta.content or "" async for chunk in stream]
    assert "".join(texts) == ANSWER


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"

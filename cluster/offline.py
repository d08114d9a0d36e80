"""`shoal generate` and `shoal chat`: a model in this process, or a conversation with a running server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import Any

from ..runtime.errors import RequestError

Overrides = dict[tuple[str, str], Any]
Conversation = list[dict[str, str]]


def engine_options(overrides: Overrides) -> dict[str, Any]:
    """The keyword arguments of `LLM` that flags gave."""
    return {name: value for (section, name), value in overrides.items() if section == "engine"}


def run_generate(model: str, prompts: list[str], overrides: Overrides, *, max_tokens: int, temperature: float) -> None:
    """Print each prompt's completion; the prompts go before them where there are several."""
    from ..runtime import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    with LLM(model, **engine_options(overrides)) as llm:
        for output in llm.generate(prompts, params):
            if len(prompts) > 1:
                print(f"> {output.prompt}")
            print(output.outputs[0].text)


def chat_with_model(model: str, overrides: Overrides, *, max_tokens: int, temperature: float) -> None:
    """Talk with a model that is loaded into this process."""
    from ..runtime import LLM, SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    loop = asyncio.new_event_loop()
    with LLM(model, **engine_options(overrides)) as llm, closing(loop):

        def answer(messages: Conversation) -> Iterator[str]:
            outputs = llm.stream(llm.text.encode_chat(messages), params)
            said = ""
            with suppress(StopAsyncIteration):
                while True:
                    text = loop.run_until_complete(anext(outputs)).outputs[0].text
                    yield text[len(said) :]
                    said = text

        converse(answer)


def chat_with_server(url: str, model: str | None, *, api_key: str | None, max_tokens: int, temperature: float) -> None:
    """Talk with the model of a running server."""
    from .client import Client

    client = Client(url, api_key=api_key)
    name = model or client.first_model()

    def answer(messages: Conversation) -> Iterator[str]:
        return client.chat(messages, model=name, max_tokens=max_tokens, temperature=temperature)

    converse(answer)


def converse(answer: Callable[[Conversation], Iterator[str]]) -> None:
    """Read lines, print answers piece by piece, until the end of input. A refused turn is forgotten."""
    messages: Conversation = []
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if not line:
            continue
        messages.append({"role": "user", "content": line})
        said = ""
        try:
            for piece in answer(messages):
                said += piece
                print(piece, end="", flush=True)
        except RequestError as error:
            messages.pop()
            print(f"refused: {error}", file=sys.stderr)
            continue
        print(flush=True)
        messages.append({"role": "assistant", "content": said})

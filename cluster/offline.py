"""`shoal generate` and `shoal chat`: a model in this process, or a conversation with a running server."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

from ..runtime.errors import RequestError
from .config import load_config
from .preflight import read_chat_template

if TYPE_CHECKING:
    from ..runtime import LLM
    from ..runtime.config import EngineConfig

Overrides = dict[tuple[str, str], Any]
Conversation = list[dict[str, str]]


def engine_config(model: str, overrides: Overrides) -> EngineConfig:
    """Of the flags that were given. Raises ConfigError: one of them is out of its limits."""
    return load_config({**overrides, ("engine", "model"): model}).engine


def _open(model: str, overrides: Overrides, *, chat_template: str | None = None) -> LLM:
    from ..runtime import LLM

    options = engine_config(model, overrides).model_dump(exclude_unset=True)
    return LLM(**options, chat_template=chat_template)


def run_generate(model: str, prompts: list[str], overrides: Overrides, *, max_tokens: int, temperature: float) -> None:
    """Print each prompt's completion; the prompts go before them where there are several."""
    from ..runtime import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    with _open(model, overrides) as llm:
        for output in llm.generate(prompts, params):
            if len(prompts) > 1:
                print(f"> {output.prompt}")
            print(output.outputs[0].text)


def chat_with_model(model: str, overrides: Overrides, *, max_tokens: int, temperature: float) -> None:
    """Talk with a model that is loaded into this process."""
    from ..runtime import SamplingParams

    params = SamplingParams(max_tokens=max_tokens, temperature=temperature)
    template = read_chat_template(overrides.get(("router", "chat_template")))
    loop = asyncio.new_event_loop()
    with _open(model, overrides, chat_template=template) as llm, closing(loop):

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

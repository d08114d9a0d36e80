"""Station 4: prompts and conversations -> token ids, and tokens -> text. No torch, no Ray."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from .detokenize import Detokenizer, OutputText
from .errors import ContextTooLong, InvalidRequest
from .generation import SamplingParams
from .template import ChatTemplate
from .tokenizer import Tokenizer
from .tokenizer_files import load_tokenizer

__all__ = ["Detokenizer", "OutputText", "Text", "Tokenizer", "choice_seed", "load_tokenizer"]

_NO_TOKENIZER = "this model has no tokenizer files: give the prompt as token ids"


class Text:
    """What one model's requests and answers are as text. Safe to use from several threads.

    tokenizer: None for a model without one; then prompts are token ids and every text is empty.
    max_model_len: prompt and output together, in tokens. vocab_size: the model's, which may exceed the tokenizer's.
    """

    def __init__(
        self, tokenizer: Tokenizer | None, max_model_len: int, vocab_size: int, *, chat_template: str | None = None
    ) -> None:
        self.tokenizer = tokenizer
        self.max_model_len = max_model_len
        self.vocab_size = vocab_size
        self._chat_template = chat_template

    @classmethod
    def load(cls, model: str | Path, max_model_len: int, vocab_size: int, *, chat_template: str | None = None) -> Text:
        """From a model's files. `chat_template`: instead of the model's own.

        Raises:
            CheckpointError: a tokenizer file cannot be read. ConfigError: no such model.
        """
        return cls(load_tokenizer(model), max_model_len, vocab_size, chat_template=chat_template)

    # Prompts

    def encode_prompt(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Raises InvalidRequest, and ContextTooLong without tokenizing where no tokenization could fit."""
        tokenizer = self._need_tokenizer()
        if not isinstance(text, str):
            raise InvalidRequest(f"the prompt must be a string; got {type(text).__name__}", param="prompt")
        if len(text) > self.max_characters:
            raise ContextTooLong(
                f"the prompt has {len(text)} characters; {self.max_model_len} tokens hold at most "
                f"{self.max_characters} (--max-model-len)",
                param="prompt",
            )
        return tokenizer.encode(text, add_special_tokens=add_special_tokens)

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """A conversation through the model's chat template, which writes its own special tokens.

        Raises:
            InvalidRequest: no template, a malformed message, or the template refuses. ContextTooLong.
        """
        text = self.render_chat(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            template_kwargs=template_kwargs,
        )
        return self.encode_prompt(text, add_special_tokens=False)

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The prompt's text; `options` as in `encode_chat`. Raises InvalidRequest, ContextTooLong."""
        self._need_tokenizer()
        return self._template.render(messages, **options)

    def check_tokens(self, ids: Sequence[int], *, param: str = "prompt") -> None:
        """Raises InvalidRequest where an id is not one of the model's."""
        for id in ids:
            if isinstance(id, bool) or not isinstance(id, int) or not 0 <= id < self.vocab_size:
                raise InvalidRequest(
                    f"{param} has the token id {id!r:.40}; ids are integers from 0 to {self.vocab_size - 1}",
                    param=param,
                )

    def check_length(self, num_prompt: int, max_tokens: int | None) -> None:
        """Raises ContextTooLong where prompt and max_tokens (None: one) do not fit, InvalidRequest for no prompt."""
        if num_prompt < 1:
            raise InvalidRequest("the prompt has no tokens; at least 1 is needed", param="prompt")
        wanted = 1 if max_tokens is None else max_tokens
        if num_prompt + wanted > self.max_model_len:
            raise ContextTooLong(
                f"the prompt has {num_prompt} tokens and max_tokens is {wanted}: together {num_prompt + wanted}, but "
                f"the context holds {self.max_model_len} (--max-model-len)",
                param="prompt" if num_prompt >= self.max_model_len else "max_tokens",
            )

    # Answers

    def output(self, params: SamplingParams) -> OutputText:
        """For one log. Raises InvalidRequest where there are stop strings and no tokenizer to find them."""
        if params.stop and self.tokenizer is None:
            raise InvalidRequest(
                "stop strings need the model's tokenizer, which has no files here: give stop_token_ids", param="stop"
            )
        return OutputText(params, self.tokenizer)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """A whole sequence as text; empty without a tokenizer."""
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens) if self.tokenizer is not None else ""

    def token_text(self, token: int) -> str:
        """One token for people (OpenAI's logprobs): part of a character reads as U+FFFD."""
        return self.tokenizer.token_text(token) if self.tokenizer is not None else ""

    def token_bytes(self, token: int) -> bytes:
        """One token's UTF-8 bytes (OpenAI's logprobs)."""
        return self.tokenizer.token_bytes(token) if self.tokenizer is not None else b""

    @property
    def eos_ids(self) -> tuple[int, ...]:
        return self.tokenizer.eos_ids if self.tokenizer is not None else ()

    @cached_property
    def max_characters(self) -> int:
        """No prompt with more characters fits the context: each of its tokens stands for at most the longest one."""
        return self.max_model_len * self._need_tokenizer().longest_token

    @cached_property
    def _template(self) -> ChatTemplate:
        tokenizer = self._need_tokenizer()
        source = self._chat_template or tokenizer.info.chat_template
        if source is None:
            raise InvalidRequest(
                "this model has no chat template: use /v1/completions, or start it with --chat-template",
                param="messages",
            )
        return ChatTemplate(source, tokenizer.info.special, max_characters=self.max_characters)

    def _need_tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidRequest(_NO_TOKENIZER, param="prompt")
        return self.tokenizer


def choice_seed(seed: int, prompt_index: int, choice_index: int) -> int:
    """The seed of one choice's log: 63 bits of a hash of the request's seed and the choice's place in it."""
    digest = hashlib.sha256(f"shoal choice {seed} {prompt_index} {choice_index}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1

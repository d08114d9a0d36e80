"""Station 1, the shapes: pieces -> OpenAI's JSON, as bytes.

A chunk is a prebuilt prefix, one escaped string and a suffix: no models and no dictionaries on the way of a token.
Nulls are left out, but for `finish_reason`, which clients look at in every chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from ..runtime.generation import TokenLogprob
from ..runtime.text import Text
from .http import event
from .prepare import Job
from .text import Choice, Piece

_json = msgspec.json.encode
_FLOOR = -9999.0  # what OpenAI writes for a logarithm of nothing: JSON has no infinity
_UNFINISHED = b',"finish_reason":null}]}\n\n'


class Usage(msgspec.Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


def usage_of(job: Job, choices: Sequence[Choice]) -> Usage:
    """A prompt counts once, however many choices were made of it."""
    prompt = sum(len(p.ids) for p in job.prompts)
    completion = sum(choice.num_tokens for choice in choices)
    cached = sum(choice.num_cached_tokens for choice in choices[:: job.n])
    return Usage(prompt, completion, prompt + completion, {"cached_tokens": cached})


class Heading(msgspec.Struct, frozen=True):
    """What is the same in all chunks of an answer."""

    id: str
    created: int
    model: str


class Speller:
    """Log-probabilities in words."""

    def __init__(self, text: Text, *, as_ids: bool) -> None:
        self._text = text
        self._as_ids = as_ids

    def token(self, token: int) -> str:
        return f"token_id:{token}" if self._as_ids else self._text.token_text(token)

    def length(self, token: int) -> int:
        return len(self._text.token_text(token))

    def chat(self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob]) -> dict[str, Any]:
        content = []
        for token, entry in zip(tokens, logprobs, strict=True):
            top = [self._entry(other, logprob) for other, logprob in entry.top]
            content.append({**self._entry(token, entry.logprob), "top_logprobs": top})
        return {"content": content}

    def completion(
        self, tokens: Sequence[int], logprobs: Sequence[TokenLogprob | None], *, offset: int
    ) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}
        for token, entry in zip(tokens, logprobs, strict=True):
            text = self.token(token)
            out["tokens"].append(text)
            out["text_offset"].append(offset)
            out["token_logprobs"].append(None if entry is None else _finite(entry.logprob))
            out["top_logprobs"].append(None if entry is None else self._top(text, entry))
            offset += self.length(token)
        return out

    def prompt(self, ids: Sequence[int], entries: Sequence[TokenLogprob | None]) -> list[dict[str, Any] | None]:
        """vLLM's `prompt_logprobs`: one object a prompt token, keyed by token id; null for the first."""
        return [None if entry is None else self._by_id(token, entry) for token, entry in zip(ids, entries, strict=True)]

    def _entry(self, token: int, logprob: float) -> dict[str, Any]:
        spelled = list(self._text.token_bytes(token))
        return {"token": self.token(token), "logprob": _finite(logprob), "bytes": spelled}

    def _top(self, text: str, entry: TokenLogprob) -> dict[str, float]:
        top: dict[str, float] = {}
        for token, logprob in entry.top:  # most likely first; of two that look the same the first one stays
            top.setdefault(self.token(token), _finite(logprob))
        top.setdefault(text, _finite(entry.logprob))
        return top

    def _by_id(self, token: int, entry: TokenLogprob) -> dict[str, Any]:
        ranked = {str(t): (logprob, rank) for rank, (t, logprob) in enumerate(entry.top, start=1)}
        ranked[str(token)] = (entry.logprob, entry.rank)
        return {
            key: {"logprob": _finite(logprob), "rank": rank, "decoded_token": self.token(int(key))}
            for key, (logprob, rank) in ranked.items()
        }


class Shape(Protocol):
    """How one kind of answer is written."""

    def opening(self, num_choices: int) -> bytes:
        """Events before the first piece."""
        ...

    def chunk(self, piece: Piece) -> bytes:
        """One event; empty where the piece says nothing yet."""
        ...

    def usage(self, usage: Usage) -> bytes:
        """The event behind the last piece."""
        ...

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        """The unstreamed answer; one merged piece a choice."""
        ...


class ChatShape:
    def __init__(self, heading: Heading, job: Job, speller: Speller) -> None:
        self._heading = heading
        self._job = job
        self._speller = speller
        self._prefix = _prefix(heading, "chat.completion.chunk")

    def opening(self, num_choices: int) -> bytes:
        role = b',"delta":{"role":"assistant","content":""}' + _UNFINISHED
        return b"".join(b'%b{"index":%d%b' % (self._prefix, i, role) for i in range(num_choices))

    def chunk(self, piece: Piece) -> bytes:
        if not (piece.text or piece.finish_reason or piece.logprobs):
            return b""
        delta = b'{"content":%b}' % _json(piece.text) if piece.text else b"{}"
        logprobs = b""
        if piece.logprobs:
            logprobs = b',"logprobs":' + _json(self._speller.chat(piece.tokens, piece.logprobs))
        return b'%b{"index":%d,"delta":%b%b%b' % (self._prefix, piece.index, delta, logprobs, _ending(piece))

    def usage(self, usage: Usage) -> bytes:
        return self._prefix + b'],"usage":' + _json(usage) + b"}\n\n"

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        answer = _answer(self._heading, "chat.completion", [self._choice(piece) for piece in pieces], usage)
        if pieces[0].prompt_logprobs is not None:
            answer["prompt_logprobs"] = self._speller.prompt(self._job.prompts[0].ids, pieces[0].prompt_logprobs)
        return _json(answer)

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, "message": {"role": "assistant", "content": piece.text}}
        if piece.logprobs is not None:
            choice["logprobs"] = self._speller.chat(piece.tokens, piece.logprobs)
        return choice | _end(piece)


class CompletionShape:
    def __init__(self, heading: Heading, job: Job, speller: Speller) -> None:
        self._heading = heading
        self._job = job
        self._speller = speller
        self._prefix = _prefix(heading, "text_completion")
        self._offsets: dict[int, int] = {}  # choice -> where its next token's text begins

    def opening(self, num_choices: int) -> bytes:
        return b""

    def chunk(self, piece: Piece) -> bytes:
        text, logprobs = self._text(piece), self._logprobs(piece)
        if not (text or piece.finish_reason or logprobs):
            return b""
        spelled = b',"logprobs":' + _json(logprobs) if logprobs else b""
        return b'%b{"index":%d,"text":%b%b%b' % (self._prefix, piece.index, _json(text), spelled, _ending(piece))

    def usage(self, usage: Usage) -> bytes:
        return self._prefix + b'],"usage":' + _json(usage) + b"}\n\n"

    def whole(self, pieces: Sequence[Piece], usage: Usage) -> bytes:
        return _json(_answer(self._heading, "text_completion", [self._choice(piece) for piece in pieces], usage))

    def _choice(self, piece: Piece) -> dict[str, Any]:
        choice: dict[str, Any] = {"index": piece.index, "text": self._text(piece)}
        logprobs = self._logprobs(piece)
        if logprobs is not None:
            choice["logprobs"] = logprobs
        if self._job.prompt_logprobs and piece.prompt_logprobs is not None:
            ids = self._job.prompts[piece.index // self._job.n].ids
            choice["prompt_logprobs"] = self._speller.prompt(ids, piece.prompt_logprobs)
        return choice | _end(piece)

    def _text(self, piece: Piece) -> str:
        if self._job.echo is not None and piece.index not in self._offsets and not piece.skipped:
            return self._job.echo[piece.index // self._job.n] + piece.text
        return piece.text

    def _logprobs(self, piece: Piece) -> dict[str, list[Any]] | None:
        """The piece's tokens, behind the prompt's in the first piece of an echo."""
        first = piece.index not in self._offsets
        offset = self._offsets.get(piece.index, 0) + sum(map(self._speller.length, self._had(piece)))
        self._offsets[piece.index] = offset
        if self._job.requests[piece.index].params.logprobs is None:
            return None
        tokens: Sequence[int] = piece.tokens
        logprobs: Sequence[TokenLogprob | None] = piece.logprobs or []
        if first and self._job.echo is not None and not piece.skipped:
            ids = self._job.prompts[piece.index // self._job.n].ids
            tokens, logprobs = [*ids, *tokens], [*(piece.prompt_logprobs or [None] * len(ids)), *logprobs]
        spelled = self._speller.completion(tokens, logprobs, offset=offset)
        self._offsets[piece.index] = offset + sum(self._speller.length(token) for token in tokens)
        return spelled

    def _had(self, piece: Piece) -> list[int]:
        """Tokens whose text stands before the piece's in an answer that goes on where it broke off."""
        if not piece.skipped or self._job.echo is None or piece.index in self._offsets:
            return piece.skipped
        return [*self._job.prompts[piece.index // self._job.n].ids, *piece.skipped]


def _prefix(heading: Heading, kind: str) -> bytes:
    head = {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}
    return event(_json(head)[:-1] + b',"choices":[')[:-2]


def _ending(piece: Piece) -> bytes:
    if piece.finish_reason is None:
        return _UNFINISHED
    stop = b"" if piece.stop_reason is None else b',"stop_reason":' + _json(piece.stop_reason)
    return b',"finish_reason":%b%b}]}\n\n' % (_json(piece.finish_reason), stop)


def _end(piece: Piece) -> dict[str, Any]:
    end: dict[str, Any] = {"finish_reason": piece.finish_reason}
    return end if piece.stop_reason is None else end | {"stop_reason": piece.stop_reason}


def _answer(heading: Heading, kind: str, choices: list[dict[str, Any]], usage: Usage) -> dict[str, Any]:
    head = {"id": heading.id, "object": kind, "created": heading.created, "model": heading.model}
    return head | {"choices": choices, "usage": msgspec.to_builtins(usage)}


def _finite(logprob: float) -> float:
    return max(logprob, _FLOOR)

"""Text <-> token ids (under station 4): one model's vocabulary, and the bytes that each of its tokens stands for.

Pure: no torch, no transformers, no Ray. The files are read in `tokenizer_files.py`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import tokenizers

from .errors import InvalidRequest

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>\Z")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """What a model's files say beside its vocabulary.

    special: the named special tokens (`bos_token`, `eos_token`, ...), as chat templates read them.
    add_bos, add_eos: put around an encoded prompt; None: as the tokenizer's own post-processor has it.
    """

    special: dict[str, str] = field(default_factory=dict)
    eos_ids: tuple[int, ...] = ()
    add_bos: bool | None = None
    add_eos: bool | None = None
    chat_template: str | None = None


class Tokenizer:
    """One model's tokenizer. Safe to use from several threads."""

    def __init__(self, backend: tokenizers.Tokenizer, info: TokenizerInfo | None = None) -> None:
        backend.no_truncation()
        backend.no_padding()
        self.backend = backend
        self.info = info or TokenizerInfo()
        added = backend.get_added_tokens_decoder()
        self.vocab_size = max([backend.get_vocab_size(), *(id + 1 for id in added)])  # ids may have holes
        self.special_ids = frozenset(id for id, token in added.items() if token.special)
        self.eos_ids = self.info.eos_ids
        self._literals = {id: token.content.encode() for id, token in added.items()}
        self._spelling = _Spelling(backend, self._literals)
        self._bytes: dict[int, bytes] = {}

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; special tokens spelled out in it count as such.

        Raises:
            InvalidRequest: not valid Unicode (a lone surrogate), or the tokenizer cannot take it.
        """
        check_unicode(text)
        around = add_special_tokens and (self.info.add_bos is not None or self.info.add_eos is not None)
        with _contained("the tokenizer cannot encode this text"):
            # Not `encode`: that holds the interpreter's lock throughout, a second for a megabyte, and counts offsets.
            batch = self.backend.encode_batch_fast([text], add_special_tokens=add_special_tokens and not around)
        ids: list[int] = batch[0].ids
        return [*self._bos, *ids, *self._eos] if around else ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """A whole sequence as text. Ids outside of the vocabulary are left out; invalid bytes become U+FFFD.

        Raises:
            InvalidRequest: the tokenizer cannot take it.
        """
        inside = [id for id in ids if 0 <= id < self.vocab_size]
        with _contained("the tokenizer cannot decode these ids"):
            return self.backend.decode(inside, skip_special_tokens=skip_special_tokens)

    @cached_property
    def longest_token(self) -> int:
        """Characters of the longest token: no text of n tokens is longer than n times this."""
        return max(map(len, self.backend.get_vocab()), default=1)

    def token_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def token_bytes(self, id: int) -> bytes:
        """What the token adds behind others, as UTF-8; part of a character for some. Empty outside of the vocabulary.

        A model may have more rows than its tokenizer has tokens, so any id is answered.
        """
        known = self._bytes.get(id)
        if known is None:
            known = self._bytes[id] = self._spelling.spell(id) if 0 <= id < self.vocab_size else b""
        return known

    def token_text(self, id: int) -> str:
        """`token_bytes` for people: part of a character reads as U+FFFD."""
        return self.token_bytes(id).decode("utf-8", "replace")

    @cached_property
    def _bos(self) -> list[int]:
        return self._named("bos_token") if self.info.add_bos else []

    @cached_property
    def _eos(self) -> list[int]:
        return self._named("eos_token") if self.info.add_eos else []

    def _named(self, name: str) -> list[int]:
        id = self.token_id(self.info.special.get(name, ""))
        return [] if id is None else [id]


class _Spelling:
    """The bytes of single tokens, for any decoder that `tokenizers` knows."""

    def __init__(self, backend: tokenizers.Tokenizer, literals: dict[int, bytes]) -> None:
        kinds = set(_kinds(backend.decoder))
        self._backend = backend
        self._byte_level = "ByteLevel" in kinds
        self._byte_fallback = "ByteFallback" in kinds
        self._literals = literals

    def spell(self, id: int) -> bytes:
        token = self._backend.id_to_token(id)
        if token is None:
            return b""
        if self._byte_level:
            # The library maps an added token's letters, too, and breaks "é"; its own text is what was meant.
            literal = self._literals.get(id)
            return literal if literal is not None else _byte_level(token)
        byte = _BYTE_TOKEN.match(token) if self._byte_fallback else None
        return bytes([int(byte[1], 16)]) if byte else self._behind_anchor(id)

    def _behind_anchor(self, id: int) -> bytes:
        """Decoders treat a sequence's first token apart (they strip its space): look at the token as a second one."""
        anchor, text = self._anchor
        both = self._backend.decode([*anchor, id], skip_special_tokens=False)
        if not both.startswith(text):
            return self._backend.decode([id], skip_special_tokens=False).encode()
        return both[len(text) :].encode()

    @cached_property
    def _anchor(self) -> tuple[list[int], str]:
        """A token that is a plain word or letter, and its text."""
        for id in range(self._backend.get_vocab_size(with_added_tokens=False)):
            text = self._backend.decode([id], skip_special_tokens=False)
            if text.isascii() and text.isalnum() and id not in self._literals:
                return [id], text
        return [], ""


def check_unicode(text: str) -> None:
    """Raises InvalidRequest where `text` has a lone surrogate: JSON can spell one, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InvalidRequest(f"the text is not valid Unicode: a lone surrogate at character {error.start}") from None


def _kinds(decoder: Any) -> Iterator[str]:
    """Types of a decoder and of those within it."""
    nodes = [json.loads(decoder.__getstate__())] if decoder is not None else []
    while nodes:
        node = nodes.pop()
        yield node["type"]
        nodes.extend(node.get("decoders", ()))


def _byte_level(token: str) -> bytes:
    try:
        return bytes([_BYTES[letter] for letter in token])
    except KeyError:
        return token.encode()


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's: a byte that is a printable Latin-1 character is that; the others take the letters from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_BYTES = _byte_alphabet()


@contextmanager
def _contained(problem: str) -> Iterator[None]:
    """Errors of the Rust side become the client's; a panic there is a BaseException and would pass every handler."""
    try:
        yield
    except Exception as error:
        raise InvalidRequest(problem) from error
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise InvalidRequest(problem) from error

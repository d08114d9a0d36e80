"""Beside station 5: logs as they lie in the store: whole ones as values, growing ones as the entries of a stream.

Whatever is read from the store is believed only with our seal on it: an HMAC over the version, the key it lies under
and its bytes. So what was cut, changed, moved to another key, or sealed with another secret is nobody's answer.
Nothing is decompressed or parsed before that.
"""

from __future__ import annotations

import hashlib
import hmac
import zlib

import msgspec

from ..runtime.generation import FinishReason, TokenLogprob
from .backend import Failure
from .log_key import derived

VERSION = b"\x01"  # of everything below; other versions are a miss
_MAC = 32
_LEVEL = 1  # the fast one: a log of 100 tokens takes some 20 us
_MAX_RATIO = 16  # of a value's plain size to `max_bytes`: on writing and, against bombs, on reading


class Unreadable(Exception):
    """Bytes that are no log of ours, or not the one that was asked for."""


class Ending(msgspec.Struct, frozen=True, array_like=True):
    """How a log ended; the fields are `TokenEvent`'s."""

    finish_reason: FinishReason
    stop_reason: int | str | None = None
    error: str | None = None

    @property
    def is_complete(self) -> bool:
        """An answer, for this reader and for others: what may be stored."""
        return self.finish_reason in (FinishReason.STOP, FinishReason.LENGTH)


class Head(msgspec.Struct, frozen=True, array_like=True):
    """What a log is made with. fingerprint: of the body, where the client named the log; else empty."""

    seed: int
    fingerprint: bytes = b""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a log: its tokens from `start` on. May repeat what was there; an `end` cuts what is behind it.

    head: with whoever begins or goes on with a log; the first one in a stream counts. failure: it failed for all that
    read it then. gave_up: its leader goes on no more, whoever needs it may.
    """

    start: int
    tokens: list[int] = []
    logprobs: list[TokenLogprob] | None = None
    prompt_logprobs: list[TokenLogprob | None] | None = None
    num_cached_tokens: int = 0
    end: Ending | None = None
    head: Head | None = None
    failure: Failure | None = None
    gave_up: bool = False


class Kept(msgspec.Struct, frozen=True, array_like=True):
    """A finished log. created: unix seconds."""

    created: float
    log: Part


_encode = msgspec.msgpack.Encoder().encode
_part = msgspec.msgpack.Decoder(Part).decode
_kept = msgspec.msgpack.Decoder(Kept).decode


class Seal:
    """Packs and unpacks, for the key that the bytes lie under. max_bytes: of a packed value."""

    def __init__(self, secret: bytes, *, max_bytes: int) -> None:
        self._secret = derived(secret, b"log values v1")
        self._max_bytes = max_bytes

    def pack_part(self, key: bytes, part: Part) -> bytes:
        return self._sealed(key, _encode(part))

    def unpack_part(self, key: bytes, data: bytes) -> Part:
        """Raises Unreadable."""
        try:
            return _part(self._opened(key, data))
        except msgspec.MsgspecError as error:
            raise Unreadable("not a log's part") from error

    def pack(self, key: bytes, kept: Kept) -> bytes | None:
        """None where it is larger than may be stored."""
        plain = _encode(kept)
        if len(plain) > _MAX_RATIO * self._max_bytes:
            return None
        data = self._sealed(key, zlib.compress(plain, _LEVEL))
        return data if len(data) <= self._max_bytes else None

    def unpack(self, key: bytes, data: bytes) -> Kept:
        """Raises Unreadable."""
        payload = self._opened(key, data)
        try:
            inflate = zlib.decompressobj()
            plain = inflate.decompress(payload, _MAX_RATIO * self._max_bytes)
            if not inflate.eof:
                raise Unreadable("too large")
            kept = _kept(plain)
        except (zlib.error, msgspec.MsgspecError) as error:
            raise Unreadable("not a finished log") from error
        if kept.log.end is None or not kept.log.end.is_complete or kept.log.start != 0:
            raise Unreadable("not a finished log")
        return kept

    def _sealed(self, key: bytes, payload: bytes) -> bytes:
        return VERSION + self._mac(key, payload) + payload

    def _opened(self, key: bytes, data: bytes) -> bytes:
        payload = data[1 + _MAC :]
        if data[:1] != VERSION or not hmac.compare_digest(data[1 : 1 + _MAC], self._mac(key, payload)):
            raise Unreadable("not sealed by us for this key")
        return payload

    def _mac(self, key: bytes, payload: bytes) -> bytes:
        return hmac.digest(self._secret, b"%b%d:%b%b" % (VERSION, len(key), key, payload), hashlib.sha256)

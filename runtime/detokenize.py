"""Tokens -> text as they come, on the way back through station 4: whole characters only, and stop strings.

Every step costs the same however long the text is: bytes go through an incremental UTF-8 decoder, characters through
one automaton for each stop string. So how the tokens were cut into events changes nothing.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from .generation import SamplingParams
from .tokenizer import Tokenizer


class Detokenizer:
    """The text of a token sequence, piece by piece; the pieces joined are the decoded sequence."""

    def __init__(self, tokenizer: Tokenizer | None, *, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids if tokenizer is not None and skip_special_tokens else frozenset()
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The characters that this token completes."""
        if self._tokenizer is None or token in self._hidden:
            return ""
        return self._utf8.decode(self._tokenizer.token_bytes(token))

    def flush(self) -> str:
        """What is left at the end: a character that was never completed reads as U+FFFD."""
        return self._utf8.decode(b"", final=True)


class _StopString:
    """Knuth, Morris and Pratt's automaton: `matched` characters of the stop string end the text so far."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.matched = 0
        self._borders = _borders(text)

    @property
    def begun(self) -> int:
        """How many characters at the text's end may be the start of a match to come."""
        # Behind a match that did not count, its own end may begin the next one.
        return self.matched if self.matched < len(self.text) else self._borders[self.matched]

    def feed(self, character: str) -> bool:
        """Whether the stop string ends with this character."""
        k = self.begun
        while k and self.text[k] != character:
            k = self._borders[k]
        self.matched = k + 1 if self.text[k] == character else 0
        return self.matched == len(self.text)


def _borders(text: str) -> list[int]:
    """For each prefix (by length) the longest proper prefix of it that is also its end."""
    borders = [0, 0]
    k = 0
    for character in text[1:]:
        while k and text[k] != character:
            k = borders[k]
        k += text[k] == character
        borders.append(k)
    return borders


class OutputText:
    """The text of one log. `num_tokens` says how many of the pushed tokens the log keeps.

    The text ends at the stop string that is completed first, of several the longest. One that is completed before
    `params.min_tokens` tokens are there does not count. Without a tokenizer every text is empty.
    """

    def __init__(self, params: SamplingParams, tokenizer: Tokenizer | None) -> None:
        self.num_tokens = 0
        self.stopped_by: str | None = None
        self._params = params
        self._detokenizer = Detokenizer(tokenizer, skip_special_tokens=params.skip_special_tokens)
        self._stops = [_StopString(text) for text in dict.fromkeys(params.stop)]
        self._held = ""  # the end of the text, where it may still turn out to begin a stop string
        eos_ids = () if tokenizer is None or params.ignore_eos else tokenizer.eos_ids
        shows_stop = params.include_stop_str_in_output
        self._hidden_ends = frozenset(() if shows_stop else (*params.stop_token_ids, *eos_ids))

    def push(self, tokens: Sequence[int], finished: bool) -> tuple[str, str | None]:
        """(the text that these tokens add, the stop string that ended the log or None).

        finished: the engine ended the log with these tokens. A stop token at the end is then kept but not shown.
        Tokens behind a stop string are dropped: `num_tokens` stays.
        """
        pieces: list[str] = []
        for i, token in enumerate(tokens):
            if self.stopped_by is not None:
                break
            self.num_tokens += 1
            last = finished and i == len(tokens) - 1
            shown = "" if last and token in self._hidden_ends else self._detokenizer.push(token)
            pieces.append(self._scan(shown))
        if finished and self.stopped_by is None:
            pieces.append(self._scan(self._detokenizer.flush()))
        if finished and self.stopped_by is None:
            pieces.append(self._held)
            self._held = ""
        return "".join(pieces), self.stopped_by

    def _scan(self, new: str) -> str:
        """Take in new characters; what may be shown now."""
        if not self._stops or not new:
            return new
        text = self._held + new
        counts = self.num_tokens >= self._params.min_tokens
        for end, character in enumerate(new, start=len(self._held) + 1):
            # Every automaton must see the character, so no generator that stops early.
            ended = [stop for stop in self._stops if stop.feed(character)]
            if ended and counts:
                return self._stop(text[:end], max(ended, key=lambda stop: len(stop.text)).text)
        keep = max(stop.begun for stop in self._stops)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def _stop(self, text: str, stop: str) -> str:
        self.stopped_by, self._held = stop, ""
        return text if self._params.include_stop_str_in_output else text[: len(text) - len(stop)]

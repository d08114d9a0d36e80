"""Texts of a number of tokens, for servers whose tokenizer is not ours: words that are one token nearly everywhere.

Common English words behind a space are one token each in the vocabularies of byte-pair encoding that models of today
have. A server that has `/tokenize` (ours and vLLM's) is asked, and then the numbers are exact.
"""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from ..runtime.errors import EngineError

COMMON = tuple(
    """time year people way day man thing woman life child world school state family student group country problem hand
    part place case week company system program question work government number night point home water room mother
    area money story fact month lot right study book eye job word business issue side kind head house service friend
    father power hour game line end member law car city community name president team minute idea kid body information
    back parent face others level office door health person art war history party result change morning reason research
    girl guy moment air teacher force education foot boy age policy music market sense nation plan college interest
    death experience effect use class control field development role effort rate heart drug show leader light voice
    wife police mind price report decision son view relationship town road arm difference value building action season
    society tax director position player record paper space ground form event official matter center couple site
    project activity star table need court oil situation cost industry figure street image phone data picture practice
    piece land product doctor wall news test movie north love support technology step baby computer type film tree
    source truth summer board term paint energy color blood future bank evening sound fire skill stage model river
    stone glass ship island winter garden window bridge forest mountain ocean shadow silver golden green black white
    great small large early young public bad able good new first last long little own other old high different next
    few same important best better sure free strong whole clear recent single main hard possible common real""".split()  # noqa: SIM905 - a list of so many strings is 300 lines
)
"""Drawn from, never added to or sorted: a seed's texts are these words by their places."""

PROBES = 5
FIRST = "Consider"  # a text's first word has no space before it

Conversation = Sequence[str]  # what is said in turns, the user first
Count = Callable[[Conversation], Awaitable[int]]
"""How many tokens a server makes of a conversation; an answer is to follow."""


@dataclass(frozen=True, slots=True)
class Words:
    """Makes texts. A prompt has `base` tokens besides those of its texts, and `pair` more for each turn before."""

    words: tuple[str, ...] = COMMON
    base: int = 0
    pair: int = 0

    def text(self, rng: random.Random, tokens: int) -> str:
        """One of `tokens` tokens, at least one."""
        return " ".join([FIRST, *rng.choices(self.words, k=max(0, tokens - 1))])


async def measure_words(count: Count) -> Words:
    """The words that are one token for this server, and what it puts around texts.

    Raises:
        EngineError: `count` failed, or words are not one token.
    """
    for word in COMMON[:PROBES]:
        short, long = f"{FIRST} {word}", f"{FIRST} {word} {word}"
        base = await count([short]) - 2
        if await count([long]) - base == 3:
            break
    else:
        raise EngineError("the server's tokenizer makes more than one token of common words")
    pair = await count([short, short, short]) - 6 - base
    return Words(tuple(await _single(COMMON, base, count)), base, pair)


async def _single(words: Sequence[str], base: int, count: Count) -> list[str]:
    """Those that add one token: a list is halved until what is left adds up."""
    surplus = await count([" ".join([FIRST, *words])]) - base - 1 - len(words)
    if surplus == 0:
        return list(words)
    if len(words) == 1:
        return []
    middle = len(words) // 2
    return await _single(words[:middle], base, count) + await _single(words[middle:], base, count)

"""A heap that is settled is not looked at again, and not leaked either."""

from __future__ import annotations

import gc
import weakref

from shoal.cluster.heap import settle_heap


class Node:
    def __init__(self) -> None:
        self.itself = self


def test_what_stays_is_not_looked_at_and_what_goes_is_found_the_next_time() -> None:
    try:
        kept, dropped = Node(), Node()
        settle_heap()
        gone = weakref.ref(dropped)
        del dropped
        gc.collect()
        assert gone() is not None  # not looked at
        after = weakref.ref(Node())
        gc.collect()
        assert after() is None  # made since
        settle_heap()
        assert gone() is None
        assert kept.itself is kept
    finally:
        gc.unfreeze()

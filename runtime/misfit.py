"""What the fields of a config make of each other, and which of them is to blame: so that a refusal has its line."""

from __future__ import annotations


class Misfit(ValueError):
    """For a model validator to raise. path: from the model's own fields down to the key that is most to blame."""

    def __init__(self, sentence: str, *path: str | int) -> None:
        super().__init__(sentence)
        self.path = path

"""A YAML file that knows its lines: what stands in it, and where each value was said.

Stricter than YAML: a key that is given twice is refused (the second would win in silence), and so is an anchor within
itself. Other anchors and merges are as in YAML.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..runtime.errors import ConfigError

Step = str | int
"""A key of a mapping, or an index into a list."""

_MERGE = "tag:yaml.org,2002:merge"


class YamlFile:
    """One file. `tree` is its content as plain values, None where it is empty."""

    def __init__(self, file: Path) -> None:
        """Raises:
        ConfigError: no such file, not YAML, or a key that is given twice; with the line.
        """
        self.file = file
        self._pairs: dict[int, list[tuple[yaml.Node, yaml.Node]]] = {}  # id of a mapping's node -> as it was written
        try:
            loader = yaml.SafeLoader(file.read_text(encoding="utf-8"))
            self._root = loader.get_single_node()
            if self._root is not None:
                self._walk(self._root, ())  # before construction, which resolves merges in place
            self.tree: Any = None if self._root is None else loader.construct_document(self._root)
        except OSError as error:
            raise ConfigError(f"{file}: {error.strerror or error}") from None
        except yaml.MarkedYAMLError as error:
            line = f":{error.problem_mark.line + 1}" if error.problem_mark is not None else ""
            raise ConfigError(f"{file}{line}: not YAML: {error.problem}") from None
        except ConfigError:
            raise
        except RecursionError:
            raise ConfigError(f"{file} is nested too deeply") from None
        except (yaml.YAMLError, ValueError) as error:  # a character that may not be there, a date that is none
            raise ConfigError(f"{file} is not YAML: {error}") from None

    def line(self, path: Sequence[Step]) -> int | None:
        """Where `path` was said, counted from 1; else the nearest part above it that was. None: nothing of it."""
        return self._follow(path)[0]

    def has(self, path: Sequence[Step]) -> bool:
        """Whether the file says anything at `path`."""
        return self._follow(path)[1]

    def place(self, path: Sequence[Step]) -> str:
        """`shoal.yaml:12`, or the file alone where nothing of `path` stands in it."""
        line = self.line(path)
        return str(self.file) if line is None else f"{self.file}:{line}"

    def _follow(self, path: Sequence[Step]) -> tuple[int | None, bool]:
        """(line of the last step that is there, whether all are)."""
        node, line = self._root, None
        for step in path:
            found = self._below(node, step)
            if found is None:
                return line, False
            said, node = found
            line = said.start_mark.line + 1
        return line, True

    def _below(self, node: yaml.Node | None, step: Step) -> tuple[yaml.Node, yaml.Node] | None:
        """(what to point at, the value) one step down; a mapping's own keys go before those merged into it."""
        if isinstance(node, yaml.SequenceNode):
            inside = isinstance(step, int) and step < len(node.value)
            return (node.value[step], node.value[step]) if inside else None
        merged: list[yaml.Node] = []
        for key, value in self._pairs.get(id(node), ()):
            if key.tag == _MERGE:
                merged += value.value if isinstance(value, yaml.SequenceNode) else [value]
            elif key.value == str(step):
                return key, value
        return next((found for source in merged if (found := self._below(source, step))), None)

    def _walk(self, node: yaml.Node, above: tuple[yaml.Node, ...]) -> None:
        """Note all mappings' entries below `node`; refuse what is given twice and what is within itself."""
        if any(node is outer for outer in above):
            raise ConfigError(f"{self.file}:{node.start_mark.line + 1}: an anchor within itself")
        if not isinstance(node, yaml.CollectionNode) or id(node) in self._pairs:
            return
        inner = (*above, node)
        if not isinstance(node, yaml.MappingNode):
            self._pairs[id(node)] = []
            for entry in node.value:
                self._walk(entry, inner)
            return
        self._pairs[id(node)] = list(node.value)
        first: dict[str, int] = {}
        for key, value in node.value:
            line = key.start_mark.line + 1
            if isinstance(key, yaml.ScalarNode) and key.tag != _MERGE:
                if key.value in first:
                    raise ConfigError(
                        f"{self.file}:{line}: {key.value} is given twice, first in line {first[key.value]}"
                    )
                first[key.value] = line
            self._walk(value, inner)

"""A YAML file that knows its lines: what stands in it, and where each value was said.

Stricter than YAML: a key that is given twice is refused (the second would win in silence), so is one that is no text
(`yes` is true), and an anchor within itself. Other anchors and merges are as in YAML. Numbers are YAML 1.2's: `1e3` is
one, and neither `1:30` (90 in YAML 1.1) nor a date is anything but text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..runtime.errors import ConfigError

Step = str | int
"""A key of a mapping, or an index into a list."""

_TAG = "tag:yaml.org,2002:"
_MERGE = f"{_TAG}merge"


_INT = r"[-+]?(0x[0-9a-fA-F]+|0[0-7]*|[1-9][0-9]*)"
_FLOAT = r"[-+]?((\.[0-9]+|[0-9]+\.[0-9]*)([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+|\.(inf|Inf|INF))|\.(nan|NaN|NAN)"


class _Loader(yaml.SafeLoader):
    """Plain values as YAML 1.2's core schema reads them; `yes`, `no`, `on` and `off` as ever, as Helm does."""


_Loader.yaml_implicit_resolvers = {
    first: [(tag, form) for tag, form in known if tag.removeprefix(_TAG) not in ("float", "int", "timestamp")]
    for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_TAG + "int", re.compile(rf"({_INT})\Z"), list("-+0123456789"))
_Loader.add_implicit_resolver(_TAG + "float", re.compile(rf"({_FLOAT})\Z"), list("-+.0123456789"))


class YamlFile:
    """One file. `tree` is its content as plain values, None where it is empty."""

    def __init__(self, file: Path) -> None:
        """Raises:
        ConfigError: no such file, not YAML, or a key that is given twice; with the line.
        """
        self.file = file
        self._pairs: dict[int, list[tuple[yaml.Node, yaml.Node]]] = {}  # id of a mapping's node -> as it was written
        try:
            loader = _Loader(_text(file))
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
        except (yaml.YAMLError, ValueError) as error:  # a tag on what it is not
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
                if key.tag != f"{_TAG}str":
                    kind = key.tag.removeprefix(_TAG)
                    raise ConfigError(
                        f"{self.file}:{line}: the key {key.value or '(none)'} is no text but {kind}: quote it"
                    )
                if key.value in first:
                    raise ConfigError(
                        f"{self.file}:{line}: {key.value} is given twice, first in line {first[key.value]}"
                    )
                first[key.value] = line
            self._walk(value, inner)


def _text(file: Path) -> str:
    """What stands in it. Raises ConfigError: what is no UTF-8, or a character that YAML has not; with the line."""
    content = file.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(f"{file}:{line}: not UTF-8: save it in that encoding") from None
    if (wrong := yaml.reader.Reader.NON_PRINTABLE.search(text)) is not None:
        line = text.count("\n", 0, wrong.start()) + 1
        raise ConfigError(f"{file}:{line}: not YAML: the character {wrong[0]!r} may not stand there")
    return text

"""Jinja for templates that nobody vouches for (under station 4): what a rendering may cost is metered.

A chat template is a program out of a model's files. The sandbox of jinja2 keeps it from the machine, but not from
running for ever or filling the memory. So every loop turn, call and filter is charged to the rendering's `Budget`;
every value that a template makes is weighed, which bounds what any later operation on it can cost; and the few
operations whose result can be far larger than what went in are computed beforehand or refused.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar

from jinja2 import Template, nodes, pass_context
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, _PassArg
from jinja2.visitor import NodeTransformer

MAX_CHARACTERS = 2**28  # made by one rendering, all intermediate strings together
_MAX_NUMBER_BITS = 4096
_MAX_INDENT = 16
_CLOCK_EVERY = 16  # charges between two looks at the clock

# What chat templates use. jinja2's others pad, wrap or invent text of any size, or run regular expressions over it.
# fmt: off
_FILTERS = (
    "abs", "attr", "bool", "capitalize", "count", "d", "default", "dictsort", "e", "escape", "first", "float",
    "forceescape", "groupby", "int", "items", "last", "length", "list", "lower", "map", "max", "min", "reject",
    "rejectattr", "reverse", "safe", "select", "selectattr", "sort", "string", "title", "trim", "truncate", "unique",
    "upper", "wordcount",
)
_DENIED_METHODS = ("center", "ljust", "rjust", "zfill", "expandtabs", "translate", "maketrans")
# fmt: on
Node = TypeVar("Node", bound=nodes.Node)
_WIDE_FIELD = re.compile(r"[0-9]{4,}|\*|\{[^{}]*\{")  # a width of a format, or one that is given by an argument


class Budget:
    """What one rendering may still cost."""

    def __init__(self, time_limit_s: float) -> None:
        self._limit_s = time_limit_s
        self._deadline = time.monotonic() + time_limit_s
        self._characters = MAX_CHARACTERS
        self._charges = 0

    def charge(self, characters: int = 0) -> None:
        """One unit of work that makes this many characters. Raises TemplateError when the budget is spent."""
        self._characters -= characters
        if self._characters < 0:
            raise TemplateError(f"it makes more than {MAX_CHARACTERS} characters")
        self._charges += 1
        if self._charges % _CLOCK_EVERY == 0 and time.monotonic() > self._deadline:
            raise TemplateError(f"it takes more than {self._limit_s:g} s")

    def weigh(self, value: Any) -> Any:
        """Charge for a value with all that is in it, as often as it is in it, and give it back."""
        if isinstance(value, str):
            self.charge(len(value))
        elif isinstance(value, Mapping):
            self.charge()
            for key, item in value.items():
                self._weigh_item(key)
                self._weigh_item(item)
        elif isinstance(value, list | tuple):
            self.charge()
            for item in value:
                self._weigh_item(item)
        return value

    def _weigh_item(self, item: Any) -> None:
        if isinstance(item, Namespace):
            raise SecurityError("a namespace cannot be put into another value")
        if isinstance(item, str | list | tuple | Mapping):
            self.weigh(item)
        else:
            self.charge()

    def expect(self, count: int, size: int) -> None:
        """Raise TemplateError where `count` times `size` characters cannot be paid."""
        if count > 0 and size > 0 and count * size > self._characters:
            raise TemplateError(f"it makes more than {MAX_CHARACTERS} characters")


class MeteredContext(Context):
    """A rendering's variables, and its budget."""

    budget: Budget

    def __init__(self, environment: MeteredEnvironment, *args: Any, **kwargs: Any) -> None:
        super().__init__(environment, *args, **kwargs)
        self.budget = Budget(environment.time_limit_s)

    def derived(self, locals: dict[str, Any] | None = None) -> Context:
        inner = super().derived(locals)
        assert isinstance(inner, MeteredContext)
        inner.budget = self.budget
        return inner


class _Generation(Extension):
    """`{% generation %}`: marks the model's own words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """The sandbox in which templates are compiled and rendered."""

    context_class = MeteredContext
    intercepted_binops = frozenset(["+", "-", "*", "/", "//", "%", "**"])

    def __init__(self, *, time_limit_s: float) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_printed
        )
        self.time_limit_s = time_limit_s
        self.filters = {name: _metered(self.filters[name]) for name in _FILTERS if name in self.filters} | _OWN_FILTERS
        del self.globals["lipsum"]

    def compile_metered(self, source: str) -> Template:
        """Raises TemplateError (a syntax error, too), RecursionError."""
        tree = _Meter().visit(self.parse(source))
        return Template.from_code(self, self.compile(tree), self.make_globals(None))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        if isinstance(obj, int | float | bytes | type) or (isinstance(obj, str) and attr in _DENIED_METHODS):
            return False
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """`str.format` and `format_map`, as the sandbox gives them to templates."""
        safe = super().wrap_str_format(value)
        if safe is None:
            return None

        @pass_context
        def formatted(context: Context, *args: Any, **kwargs: Any) -> str:
            text = str(value.__self__)
            _check_format(_budget(context), text, text.count("{"), (args, kwargs))
            return safe(*args, **kwargs)

        return formatted

    def call(self, context: Context, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        budget = _budget(context)
        budget.charge()
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        if isinstance(owner, str):
            if name == "join" and args:
                return _joined(budget, args[0], owner)
            if name == "replace" and len(args) >= 2:
                _check_replace(budget, owner, *args[:2])
        elif obj is Namespace and any(key.startswith("_") for key in kwargs):
            raise SecurityError("a namespace has no private attributes")
        return budget.weigh(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        budget = _budget(context)
        if operator == "%" and isinstance(left, str):
            _check_format(budget, left, left.count("%"), right)
        elif operator in ("*", "**"):
            _check_growth(budget, operator, left, right)
        return budget.weigh(super().call_binop(context, operator, left, right))

    # What `_Meter` puts into templates; `call` weighs what they return.

    @pass_context
    def tick(self, context: Context, characters: int) -> None:
        _budget(context).charge(characters)

    def weighed(self, value: Any) -> Any:
        return value

    @pass_context
    def concatenate(self, context: Context, *parts: Any) -> str:
        return _joined(_budget(context), parts, "")


class _Meter(NodeTransformer):
    """Puts a tick into every loop, and weighs what is not made through `call` or `call_binop`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:  # noqa: N802 (jinja2's name)
        self.generic_visit(node)
        printed = sum(len(data.data) for child in node.body for data in _all(child, nodes.TemplateData))
        node.body.insert(0, nodes.ExprStmt(_call("tick", nodes.Const(printed))))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:  # noqa: N802 (jinja2's name)
        self.generic_visit(node)
        return _call("concatenate", *node.nodes)

    def visit_NSRef(self, node: nodes.NSRef) -> nodes.Node:  # noqa: N802 (jinja2's name)
        if node.attr.startswith("_"):
            raise SecurityError("a namespace has no private attributes")
        return node

    def _visit_literal(self, node: nodes.Expr) -> nodes.Node:
        self.generic_visit(node)
        return _call("weighed", node) if getattr(node, "ctx", "load") == "load" else node

    visit_List = visit_Dict = visit_Tuple = _visit_literal


def _all(node: nodes.Node, kind: type[Node]) -> Iterable[Node]:
    return [node] if isinstance(node, kind) else node.find_all(kind)


def _call(method: str, *args: nodes.Expr) -> nodes.Call:
    return nodes.Call(nodes.EnvironmentAttribute(method), list(args), [], None, None)


def _budget(context: Context) -> Budget:
    assert isinstance(context, MeteredContext)
    return context.budget


@pass_context
def _printed(context: Context, value: Any) -> Any:
    """Each `{{ ... }}`: macros and block assignments gather what they print."""
    text = value if isinstance(value, str) else str(value)
    _budget(context).charge(len(text))
    return text


def _metered(call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of jinja2's whose result is weighed."""
    passes = _PassArg.from_obj(call)

    @pass_context
    def filtered(context: Context, *args: Any, **kwargs: Any) -> Any:
        first: dict[Any, tuple[Any, ...]] = {
            _PassArg.context: (context,),
            _PassArg.eval_context: (context.eval_ctx,),
            _PassArg.environment: (context.environment,),
        }
        budget = _budget(context)
        budget.charge()
        return budget.weigh(call(*first.get(passes, ()), *args, **kwargs))

    return filtered


# Filters and operations that can make much of little


@pass_context
def _tojson(
    context: Context, value: Any, *, ensure_ascii: bool = False, indent: int | None = None, **style: Any
) -> str:
    """json.dumps, as transformers has it: jinja2's own escapes HTML."""
    if not set(style) <= {"separators", "sort_keys"}:
        raise TemplateError("tojson takes ensure_ascii, indent, separators and sort_keys")
    if indent is not None and indent > _MAX_INDENT:
        raise TemplateError(f"tojson indents by at most {_MAX_INDENT}")
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, **style)
    return _joined(_budget(context), encoder.iterencode(value), "")


@pass_context
def _join(context: Context, value: Iterable[Any], d: str = "", attribute: str | int | None = None) -> str:
    if attribute is not None:
        value = (context.environment.getitem(item, attribute) for item in value)
    return _joined(_budget(context), value, str(d))


def _joined(budget: Budget, parts: Iterable[Any], separator: str) -> str:
    """Charged part by part, so that nothing large is begun: one long string may be in a list many times."""
    texts = []
    for part in parts:
        texts.append(part if isinstance(part, str) else str(part))
        budget.charge(len(texts[-1]) + len(separator))
    return separator.join(texts)


@pass_context
def _replace(context: Context, text: Any, old: str, new: str, count: int = -1) -> str:
    _check_replace(_budget(context), str(text), old, new)
    return str(text).replace(str(old), str(new), count)


@pass_context
def _indent(context: Context, text: Any, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
    margin = width if isinstance(width, str) else " " * min(width, _MAX_INDENT)
    lines = str(text).split("\n")
    _budget(context).expect(len(lines), len(margin))
    out = [margin + line if (line or blank) and (i or first) else line for i, line in enumerate(lines)]
    return "\n".join(out)


@pass_context
def _format(context: Context, text: Any, *args: Any, **kwargs: Any) -> str:
    text = str(text)
    _check_format(_budget(context), text, text.count("%"), kwargs or args)
    return str(text % (kwargs or args))


_OWN_FILTERS: dict[str, Callable[..., Any]] = {
    "tojson": _tojson, "join": _join, "replace": _replace, "indent": _indent, "format": _format,
}  # fmt: skip


def _check_replace(budget: Budget, text: str, old: Any, new: Any) -> None:
    budget.expect(len(text) // max(1, len(str(old))) + 1, len(str(new)))


def _check_format(budget: Budget, text: str, fields: int, values: Any) -> None:
    if _WIDE_FIELD.search(text):
        raise SecurityError("a format's width is at most three digits")
    budget.expect(fields, len(str(values)))


def _check_growth(budget: Budget, operator: str, left: Any, right: Any) -> None:
    if isinstance(left, int) and isinstance(right, int):
        bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
        if bits > _MAX_NUMBER_BITS:
            raise TemplateError(f"a number has more than {_MAX_NUMBER_BITS} bits")
    elif operator == "*":
        count, value = (left, right) if isinstance(left, int) else (right, left)
        if isinstance(count, int) and isinstance(value, str | list | tuple):
            budget.expect(count, len(value))

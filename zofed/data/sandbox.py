"""A Jinja environment for other people's templates: what they may write, call and reach, and how long they may take.

Jinja's own sandbox keeps a template from Python's insides, but lets it fill the memory and run for years. Here it can
neither keep values nor call itself, every loop is counted, and what could make a text longer is bounded before it does.
"""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import lru_cache, wraps
from typing import Any

from jinja2 import StrictUndefined, Template, Undefined, nodes, pass_context
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment

LONGEST = 1_000_000  # characters of what a template makes, and of any text on its way
TURNS = 100_000  # of all loops of one rendering
SECONDS = 5.0  # of one rendering, looked at in each turn and at each piece of text
DEEPEST = 60  # parts of a template inside one another
ITEMS = 64  # of all lists that a template writes down
BITS = 1000  # of a product

_NODES = {
    nodes.Template, nodes.Output, nodes.TemplateData, nodes.Const, nodes.Name, nodes.Getattr,
    nodes.Getitem, nodes.Slice, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword, nodes.Compare, nodes.Operand,
    nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos, nodes.Not, nodes.And,
    nodes.Or, nodes.CondExpr, nodes.Concat, nodes.List, nodes.Tuple, nodes.Dict, nodes.Pair, nodes.For, nodes.If,
}  # fmt: skip
_OF_TEXTS = ("capitalize", "float", "int", "lower", "string", "title", "trim", "upper", "wordcount")
_FILTERS = (
    *_OF_TEXTS, "abs", "count", "d", "default", "dictsort", "first", "items", "last", "length", "list", "map", "max",
    "min", "reject", "rejectattr", "reverse", "select", "selectattr", "sort", "unique",
)  # fmt: skip
_METHODS = {
    str: {
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalpha", "isdigit", "isupper", "islower",
        "lower", "lstrip", "partition", "removeprefix", "removesuffix", "replace", "rfind", "rpartition", "rsplit",
        "rstrip", "split", "splitlines", "startswith", "strip", "swapcase", "title", "upper",
    },
    dict: {"get", "items", "keys", "values"},
    list: {"count", "index"},
    tuple: {"count", "index"},
}  # fmt: skip
_LOOP = {"index", "index0", "first", "last", "length", "revindex", "revindex0"}
_LIMITS = " limits"  # no name that a template can write


class OutOfBounds(Exception):  # noqa: N818
    """A template does more than it may; the text says what."""


class Limits:
    """What is left of one rendering's turns and seconds."""

    def __init__(self) -> None:
        self._turns, self._end = TURNS, time.monotonic() + SECONDS

    def spend(self, turns: int = 0) -> None:
        """Raise OutOfBounds where nothing is left."""
        self._turns -= turns
        if self._turns < 0:
            raise OutOfBounds(f"its loops take more than {TURNS:,} turns")
        if time.monotonic() > self._end:
            raise OutOfBounds(f"it takes more than {SECONDS:g} seconds")


class Sandbox(ImmutableSandboxedEnvironment):
    """Texts' and mappings' harmless methods, some filters, no function."""

    intercepted_binops = frozenset({"*", "%", "+"})  # which Jinja would otherwise compute while it compiles

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Numbers multiply and remain; texts and lists add up to a bound."""
        sized = any(isinstance(value, str | list | tuple) for value in (left, right))
        if operator != "+" and sized:
            raise OutOfBounds(f"it has a text or list with {operator}")
        if operator == "*" and sum(value.bit_length() for value in (left, right) if isinstance(value, int)) > BITS:
            raise OutOfBounds("it multiplies numbers that are too large")
        if operator == "+" and isinstance(left, str) and isinstance(right, str):
            _check(len(left) + len(right))
        return super().call_binop(context, operator, left, right)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Whether a template may read it: a method of the list above, or what a loop tells of itself."""
        if isinstance(obj, LoopContext):
            return attr in _LOOP
        return any(isinstance(obj, kind) and attr in names for kind, names in _METHODS.items())

    def is_safe_callable(self, obj: Any) -> bool:
        """Whether it is one of those methods."""
        owner, name = getattr(obj, "__self__", None), getattr(obj, "__name__", "")
        return any(type(owner) is kind and name in names for kind, names in _METHODS.items())

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:  # type: ignore[override]
        """Of a method; `replace` as the filter of that name."""
        if getattr(obj, "__name__", "") == "replace" and isinstance(getattr(obj, "__self__", None), str):
            return _replace(obj.__self__, *args, **kwargs)
        return super().call(context, obj, *args, **kwargs)


def compiled(source: str) -> tuple[Template, nodes.Template]:
    """A template, and what it consists of. Raises TemplateError or OutOfBounds for one that is none, or may not be."""
    environment = _environment()
    parsed = environment.parse(source)
    _check_parts(parsed)
    plain = environment.parse(source)
    for loop in list(parsed.find_all(nodes.For)):
        loop.iter = nodes.Filter(loop.iter, _LIMITS, [], [], None, None, lineno=loop.lineno)
    for concat in list(parsed.find_all(nodes.Concat)):
        concat.nodes = [nodes.Filter(nodes.List(concat.nodes), _LIMITS + " text", [], [], None, None)]
    code = environment.compile(parsed, filename="<template>")
    return Template.from_code(environment, code, {}), plain


def rendered(template: Template, values: Mapping[str, Any]) -> str:
    """The text of some values. Raises OutOfBounds beyond LONGEST, TURNS or SECONDS, and whatever a filter raises."""
    limits, parts, length = Limits(), list[str](), 0
    for part in template.generate({**values, _LIMITS: limits}):
        length += len(part)
        _check(length)
        limits.spend()
        parts.append(part)
    return "".join(parts)


@lru_cache(maxsize=1)
def _environment() -> Sandbox:
    environment = Sandbox(undefined=StrictUndefined, keep_trailing_newline=True, autoescape=False)
    environment.globals.clear()  # range, lipsum and the like
    environment.finalize = _plain
    own = {"replace": _replace, "join": _join, _LIMITS: _counted, _LIMITS + " text": _concat}
    environment.filters = {name: environment.filters[name] for name in _FILTERS} | own
    environment.filters |= {name: _of_text(environment.filters[name]) for name in _OF_TEXTS}
    return environment


def _check_parts(parsed: nodes.Template) -> None:
    """Refuse what a template does not need: it could keep, define, import or repeat without end."""
    if (
        sum(sum(1 for _ in one.iter_child_nodes()) for one in parsed.find_all((nodes.List, nodes.Tuple, nodes.Dict)))
        > ITEMS
    ):
        raise OutOfBounds(f"its lists have more than {ITEMS} items")
    stack: list[tuple[nodes.Node, int]] = [(parsed, 0)]
    while stack:
        node, depth = stack.pop()
        if type(node) not in _NODES:
            raise OutOfBounds(f"it has the part {type(node).__name__.lower()!r}: only values, filters, if and for are")
        if depth > DEEPEST:
            raise OutOfBounds(f"its parts are more than {DEEPEST} deep inside one another")
        if isinstance(node, nodes.For) and node.recursive:
            raise OutOfBounds("it has a recursive loop")
        stack += [(child, depth + 1) for child in node.iter_child_nodes()]


@pass_context
def _counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop."""
    limits: Limits = context[_LIMITS]
    for item in items:
        limits.spend(1)
        yield item


def _of_text(call: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of texts that does not write a whole list first."""

    @wraps(call)  # with the marks by which Jinja hands some filters its environment
    def run(*args: Any, **kwargs: Any) -> Any:
        if any(isinstance(value, list | tuple | dict) for value in args):
            raise OutOfBounds("it has a list where a text is wanted")
        return call(*args, **kwargs)

    return run


def _plain(value: Any) -> Any:
    """What is written: an empty cell as nothing. Raises OutOfBounds for what has no text of its own, or a long one."""
    if value is None or value != value:
        return ""
    length, rest = 0, [value]
    while rest:
        item = rest.pop()
        if isinstance(item, list | tuple):
            rest += item
        elif isinstance(item, dict):
            rest += [*item.keys(), *item.values()]
        elif not isinstance(item, str | int | float | Undefined | None):  # of a method it is an address
            raise OutOfBounds(f"it writes a {type(item).__name__}, which is neither a text nor a number")
        length += len(item) if isinstance(item, str | list | tuple | dict) else 1
        _check(length)
    return value


def _concat(parts: Iterable[Any]) -> str:
    texts = [str(_plain(part)) for part in parts]
    _check(sum(map(len, texts)))
    return "".join(texts)


def _replace(text: Any, old: Any, new: Any, count: int = -1) -> str:
    """`text` with `new` for each `old`."""
    text, old, new = str(text), str(old), str(new)
    found = text.count(old)
    _check(len(text) + min(found, count if count >= 0 else found) * max(0, len(new) - len(old)))
    return text.replace(old, new, count)


def _join(items: Iterable[Any], separator: str = "", attribute: str | None = None) -> str:
    """The items' texts with a separator between them. attribute: of the items, instead of them."""
    take: Callable[[Any], Any] = (lambda item: item) if attribute is None else (lambda item: item[attribute])
    texts = [str(_plain(take(item))) for item in items]
    _check(sum(map(len, texts)) + len(str(separator)) * len(texts))
    return str(separator).join(texts)


def _check(length: int) -> None:
    if length > LONGEST:
        raise OutOfBounds(f"it makes a text of more than {LONGEST:,} characters")

"""Renders a checkpoint's Jinja chat template, which is untrusted code, with limits on time and memory.

The sandbox has the filters and globals of transformers' `apply_chat_template`. Jinja's own sandbox only protects
Python's internals: two nested loops run for hours, and `"a" * 10**10` takes 10 GB. So a template is compiled with a
check in each loop, call, filter and arithmetic operation. A check counts the characters produced and periodically reads
this thread's processor time, so the limits hold in any thread and under any load.
"""

from __future__ import annotations

import functools
import re
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MOST_SOURCE = 2**16
"""The longest allowed template in characters; the longest published ones have about 20,000."""
_LARGEST = 2**25  # characters of one text, elements of one list
_ELEMENT = 128  # characters that an element of a list counts as
_MOST_BITS = 4096  # of an integer
_CHECKS = 64  # loop steps between two checks of the clock


class TemplateLimitError(Exception):
    """A template exceeded its limit of time or size. Not a subclass of Jinja's errors, some of which Jinja handles
    itself.
    """


@dataclass(frozen=True)
class Limits:
    """Limits of one rendering: seconds of this thread's CPU time, and characters produced, in the output or not."""

    seconds: float
    characters: int


PROBE = Limits(0.25, 2**24)
"""Limits for one message of a few words."""
PROMPT = Limits(5.0, 2**28)
"""Limits for any prompt: a conversation as long as the longest context takes about a hundredth of this."""


class _Rendering(threading.local):
    """The remaining limits of this thread's rendering, and the output so far, for `{% generation %}`."""

    deadline = float("inf")
    characters = _LARGEST
    checks = _CHECKS
    written = 0
    blocks: list[tuple[int, int]] | None = None


class CompiledTemplate:
    """A compiled chat template. For an invalid source the constructor raises Jinja's errors or RecursionError."""

    def __init__(self, source: str) -> None:
        if len(source) > MOST_SOURCE:
            raise TemplateLimitError(f"it has {len(source)} characters, more than {MOST_SOURCE}")
        self._environment = _Sandbox()
        self._template = self._environment.from_string(_Checks().visit(self._environment.parse(source)))

    def render(self, variables: Mapping[str, Any], limits: Limits) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the character spans of its `{% generation %}` blocks. Raises TemplateLimitError, and anything
        that the template raises."""
        pieces: list[str] = []
        with self._environment.rendering(limits) as state:
            for piece in self._template.generate(variables):
                pieces.append(piece)
                state.written += len(piece)
                if state.written > _LARGEST:
                    raise TemplateLimitError(f"it writes more than {_LARGEST} characters")
            return "".join(pieces), state.blocks or []


class _GenerationBlocks(Extension):
    """`{% generation %}` ... `{% endgeneration %}` around the model's text, as in transformers."""

    tags = {"generation"}  # noqa: RUF012 as jinja2 declares it

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_note"), [], [], body).set_lineno(line)

    def _note(self, caller: Callable[[], str]) -> str:
        text = caller()
        state = self.environment.state  # type: ignore[attr-defined]
        state.blocks = [*(state.blocks or []), (state.written, state.written + len(text))]
        return text


class _Checks(NodeTransformer):
    """Inserts the sandbox's checks into a parsed template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        written = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
        written += sum(len(each.value) for each in node.find_all(nodes.Const) if isinstance(each.value, str))
        node.iter = _filtered(cast(nodes.Expr, node.iter), "checked_loop", nodes.Const(written))
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Expr:
        self.generic_visit(node)
        node.nodes = [_filtered(each, "checked") for each in node.nodes]
        return _filtered(node, "checked")

    def _visit_checked(self, node: nodes.Expr) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "checked")

    visit_List = visit_Dict = visit_Compare = _visit_checked

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Expr:
        self.generic_visit(node)
        return _filtered(node, "checked") if node.ctx == "load" else node


def _filtered(node: nodes.Expr, name: str, *arguments: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(arguments), [], None, None, lineno=node.lineno)


# Filters that do not render a list's elements, so that only its length counts; others may render them.
_SHALLOW = {"count", "d", "default", "first", "items", "last", "length", "list", "map", "reject", "rejectattr"}
_SHALLOW |= {"reverse", "select", "selectattr"}
# Filters and methods whose result may be as long as the product of their arguments, which may be widths.
_MULTIPLY = {"batch", "center", "expandtabs", "format", "format_map", "indent", "ljust", "rjust", "slice", "to_bytes"}
_MULTIPLY |= {"tojson", "translate", "wordwrap", "zfill"}
_WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\*|\d{5})")
_WIDE_BRACES = re.compile(r"[:{][^{}]*(\{[^}]*\}[^{}]*\}|\d{5})")


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset(("+", "*", "**", "%"))

    def __init__(self) -> None:
        from transformers.utils.chat_template_utils import _compile_jinja_template  # its filters and globals

        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            optimized=False,  # else constant expressions would be computed without checks while compiling
            finalize=self._checked,
            extensions=[_GenerationBlocks, jinja2.ext.loopcontrols],
        )
        theirs = _compile_jinja_template("").environment
        self.globals.update(theirs.globals)
        self.filters = {name: self._checked_filter(name, each) for name, each in theirs.filters.items()}
        del self.globals["lipsum"], self.filters["urlize"]  # unbounded time, and unused in chat templates
        self.filters |= {"checked": self._checked, "checked_loop": self._checked_loop}
        self.state = _Rendering()

    @contextmanager
    def rendering(self, limits: Limits) -> Iterator[_Rendering]:
        state = self.state
        state.deadline, state.characters = time.thread_time() + limits.seconds, limits.characters
        state.checks, state.written, state.blocks = _CHECKS, 0, None
        try:
            yield state
        finally:
            state.deadline, state.characters = float("inf"), _LARGEST

    def _check(self, made: int = 0) -> None:
        """Count one operation that produced `made` characters."""
        state = self.state
        state.characters -= made
        state.checks -= 1 + made // 1024
        if state.characters < 0:
            raise TemplateLimitError("it makes more text than any prompt has")
        if state.checks < 0:
            state.checks = _CHECKS
            if time.thread_time() > state.deadline:
                raise TemplateLimitError("it takes longer than any prompt needs")

    def _checked(self, value: Any) -> Any:
        self._check(_size(value))
        return value

    def _checked_loop(self, values: Any, written: int) -> Iterator[Any]:
        for value in values:
            self._check(written)
            yield value

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = {"**": left.bit_length() * abs(right), "*": left.bit_length() + right.bit_length()}.get(operator, 0)
            if bits > _MOST_BITS:
                raise TemplateLimitError(f"it computes numbers of more than {_MOST_BITS} bits")
        elif operator == "*":
            value, count = (right, left) if isinstance(left, int) else (left, right)
            self._afford(_size(value) * (abs(count) if isinstance(count, int) else 1))
        elif operator == "+":
            self._afford(_length(left) + _length(right))
        if operator == "%" and isinstance(left, str):
            if _WIDE_PERCENT.search(left):
                raise TemplateLimitError("it formats a value with a width of more than 9,999 characters")
            self._afford(len(left) + len(left) * _size(right))
        return self._result(super().call_binop(context, operator, left, right))

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:
        method = getattr(obj, "__wrapped__", obj)  # str.format comes wrapped by the sandbox
        owner = getattr(method, "__self__", None)
        if isinstance(owner, (str, bytes, int, float, list, tuple, dict)):
            self._afford(_made(getattr(method, "__name__", ""), owner, args, kwargs))
        made = super().call(context, obj, *args, **kwargs)
        return self._checked(made) if isinstance(made, (dict, list, tuple)) else self._result(made)

    def _checked_filter(self, name: str, function: Callable) -> Callable:
        @functools.wraps(function)  # also Jinja's note of whether it takes the context
        def checked(*args: Any, **kwargs: Any) -> Any:
            if name not in _SHALLOW:
                given = args[1:] if hasattr(function, "jinja_pass_arg") else args
                self._afford(_made(name, given[0] if given else "", given[1:], kwargs))
            return self._result(function(*args, **kwargs))

        return checked

    def _afford(self, characters: int) -> None:
        """Refuse an operation before it makes that many characters."""
        if characters > min(_LARGEST, self.state.characters):
            raise TemplateLimitError("it makes more text than any prompt has")

    def _result(self, value: Any) -> Any:
        self._check(_length(value))
        return value


def _made(name: str, value: Any, args: tuple, kwargs: Mapping[str, Any]) -> int:
    """An upper bound of the characters that a filter or a method makes of `value` and its arguments."""
    size, given = _size(value), [*args, *kwargs.values()]
    if name == "join":
        parts = [value, *args] if isinstance(value, str) else [*args, value]  # "".join(parts), or parts | join("")
        separators = sum(_length(each) for each in (value, *args) if not isinstance(each, str)) + 1
        return sum(map(_size, parts)) + separators * sum(len(each) for each in parts if isinstance(each, str))
    if name == "replace" and len(args) > 1 and isinstance(args[0], str):
        return size + (size // max(1, len(args[0])) + 1) * _size(args[1])
    if name == "round" and any(isinstance(each, int) and abs(each) > 400 for each in given):
        raise TemplateLimitError("it rounds to more than 400 digits")
    if name == "sum" and any(isinstance(each, (list, tuple)) for each in given):
        return size * max(1, _length(value))
    if name in ("format", "format_map"):
        if isinstance(value, str) and (_WIDE_BRACES.search(value) or _WIDE_PERCENT.search(value)):
            raise TemplateLimitError("it formats a value with a width of more than 9,999 characters")
        return size * (1 + sum(map(_size, given)))
    for each in given if name in _MULTIPLY else ():
        size *= max(1, abs(each) if isinstance(each, int) else _size(each))
    return size


def _length(value: Any) -> int:
    return len(value) if isinstance(value, (str, bytes, list, tuple, dict)) else 1


def _size(value: Any) -> int:
    """Characters of a value's texts, and what its lists' elements count. One list many times within another, which is
    how a few lines make a text without end, counts each time."""
    if isinstance(value, str):
        return len(value)
    total, left = 0, [value]
    while left:
        each = left.pop()
        total += len(each) if isinstance(each, (str, bytes)) else _ELEMENT
        if isinstance(each, dict):
            left += [*each.keys(), *each.values()]
        elif isinstance(each, (list, tuple)):
            left += each
        elif isinstance(each, Namespace):
            raise TemplateLimitError("it writes out a namespace")
        if total > _LARGEST:
            raise TemplateLimitError("it makes more text than any prompt has")
    return total

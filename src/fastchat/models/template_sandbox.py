"""A Jinja environment for templates that nobody vouches for: no rendering takes long, or much memory, whatever it does.

Jinja's own sandbox keeps a template from Python's inside; it does not keep it from looping for ever. Here every turn of
a loop, every call and every filter looks at the clock of the thread that renders, and everything that makes a text or
list larger than its parts (`*`, `+`, `~`, `%`, `replace`, `join`, widths) is looked at before it is done.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

from jinja2 import Template, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

MAX_TEMPLATE_CHARACTERS = 64 * 1024
MAX_TEMPLATE_TURNS = 100_000
"""Of all loops over `range` in one rendering together."""
MAX_TEMPLATE_CPU_S = 0.5
"""Of the thread that renders."""
MAX_RENDERED_CHARACTERS = 16 * 2**20
"""Four times what a request can hold."""
MAX_MADE_CHARACTERS = 8 * MAX_RENDERED_CHARACTERS
"""Of all that one rendering puts together on its way."""
MAX_WIDTH = 256
"""What a text may be padded or indented to."""

_WIDTHS = frozenset(
    ("batch", "center", "expandtabs", "indent", "ljust", "rjust", "slice", "tojson", "wordwrap", "xmlattr", "zfill")
)
_FORMATS = frozenset(("format", "format_map"))
_LARGE_WIDTH = re.compile(r"\d{4}|\*|:[^}]*\{")


class _WatchedCode(CodeGenerator):
    """Jinja's compiler, which here begins every turn of a loop with `turn()` and writes `~` as `joined()`."""

    def visit_For(self, node: nodes.For, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        turn = nodes.Call(nodes.EnvironmentAttribute("turn"), [], [], None, None)
        node.body = [nodes.ExprStmt(turn).set_lineno(node.lineno), *node.body]
        super().visit_For(node, frame)

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:  # noqa: N802 - jinja2's name
        self.write("environment.joined((")
        for part in node.nodes:
            self.visit(part, frame)
            self.write(", ")
        self.write("))")


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Templates of this environment are rendered with `render_within_limits`, and by nothing else."""

    code_generator_class = _WatchedCode
    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, **options: Any) -> None:  # Any: jinja2's options
        super().__init__(**options)
        del self.globals["lipsum"]
        self._budget = _Budget()
        for name, apply in list(self.filters.items()):
            self.filters[name] = self._watched(name, apply)

    def add_filter(self, name: str, apply: Callable[..., Any]) -> None:
        """A filter under the same watch as Jinja's."""
        self.filters[name] = self._watched(name, apply)

    def render_within_limits(self, template: Template, **variables: Any) -> str:  # Any: a template's values
        """The text of a template. Raises `SecurityError` where it takes too much."""
        texts: list[str] = []
        num_characters = 0
        with self._budget.renewed():
            for piece in template.generate(range=_LimitedRange(), **variables):
                texts.append(piece)
                num_characters += len(piece)
                if num_characters > MAX_RENDERED_CHARACTERS:
                    raise SecurityError(f"more than {MAX_RENDERED_CHARACTERS} characters")
                self._budget.look_at_clock()
        return "".join(texts)

    def turn(self) -> None:
        """Called at the start of every turn of every loop."""
        self._budget.look_at_clock()

    def joined(self, parts: Sequence[Any]) -> str:  # Any: a template's values
        """The operator `~`."""
        texts = [str(part) for part in parts]
        self._budget.take(sum(map(len, texts)))
        return "".join(texts)

    def call(self, context: Context, callee: Any, *args: Any, **kwargs: Any) -> Any:  # Any: a template's values
        """Every call that a template makes: macros, methods, functions."""
        self._budget.look_at_clock()
        # Jinja's sandbox gives `format` in a wrapping of its own.
        subject = getattr(getattr(callee, "__wrapped__", callee), "__self__", None)
        if isinstance(subject, str):
            args = self._checked(callee.__name__, subject, args, kwargs)
        return super().call(context, callee, *args, **kwargs)

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:  # Any: a template's values
        """Nothing is raised to a power, and a product stays small: a number, or a text repeated a few times."""
        if operator == "+":
            self._budget.take(_size(left) + _size(right))
        elif operator == "%" and isinstance(left, str):
            self._checked("format", left, right if isinstance(right, tuple) else (right,), {})
        elif operator != "%":
            sizes = [len(value) if isinstance(value, str | list | tuple) else abs(value) for value in (left, right)]
            if operator == "**" or sizes[0] * sizes[1] > MAX_TEMPLATE_CHARACTERS:
                raise SecurityError(f"the operator {operator} is not for values as large as these")
        return super().call_binop(context, operator, left, right)

    def _watched(self, name: str, apply: Callable[..., Any]) -> Callable[..., Any]:  # Any: a filter's arguments
        num_before = 1 if hasattr(apply, "jinja_pass_arg") else 0  # context or environment come first

        @wraps(apply)  # which copies Jinja's marks too
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self._budget.look_at_clock()
            if len(args) <= num_before:
                return apply(*args, **kwargs)
            subject = args[num_before]
            if name == "join":
                separator = kwargs.get("d", (*args[num_before + 1 :], "")[0])
                (subject,) = self._checked(name, str(separator), (subject,), {})
                return apply(*args[:num_before], subject, *args[num_before + 1 :], **kwargs)
            args_after = self._checked(name, subject, args[num_before + 1 :], kwargs)
            return apply(*args[: num_before + 1], *args_after, **kwargs)

        return filtered

    def _checked(self, name: str, subject: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        """The arguments of a method or filter, after a look at what it would make."""
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        numbers = [value for value in (*args, *kwargs.values()) if isinstance(value, int)]
        if name in _WIDTHS and any(abs(number) > MAX_WIDTH for number in numbers):
            raise SecurityError(f"{name} takes at most {MAX_WIDTH}")
        self._budget.take(_size_made(name, subject, args, kwargs))
        return args


class _Budget(threading.local):
    """What the rendering of this thread may still take."""

    def __init__(self) -> None:
        self._ends_at = 0.0
        self._num_left = 0

    @contextmanager
    def renewed(self) -> Iterator[None]:
        """While the block runs, a new rendering has its budget."""
        self._ends_at = time.thread_time() + MAX_TEMPLATE_CPU_S
        self._num_left = MAX_MADE_CHARACTERS
        try:
            yield
        finally:
            self._ends_at = 0.0

    def look_at_clock(self) -> None:
        """Raise `SecurityError` where time is over."""
        if self._ends_at and time.thread_time() > self._ends_at:
            raise SecurityError(f"more than {MAX_TEMPLATE_CPU_S} seconds")

    def take(self, num_characters: int) -> None:
        """Raise `SecurityError` where so many characters more are too many."""
        self.look_at_clock()
        self._num_left -= num_characters
        if self._ends_at and (num_characters > MAX_RENDERED_CHARACTERS or self._num_left < 0):
            raise SecurityError(f"more than {MAX_RENDERED_CHARACTERS} characters")


class _LimitedRange:
    """`range` for one rendering; all calls together give so many numbers at most."""

    def __init__(self) -> None:
        self._num_left = MAX_TEMPLATE_TURNS

    def __call__(self, *bounds: int) -> range:
        numbers = range(*bounds)
        self._num_left -= len(numbers)
        if self._num_left < 0:
            raise SecurityError(f"more than {MAX_TEMPLATE_TURNS} turns of loops")
        return numbers


def _size(value: Any) -> int:  # Any: a template's values
    return len(value) if isinstance(value, str | list | tuple) else 0


def _size_made(name: str, subject: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> int:  # Any: the same
    """How many characters a method or filter makes at most, where that can be more than it is given."""
    if name == "replace" and len(args) >= 2:
        return _size(subject) + str(subject).count(str(args[0])) * len(str(args[1]))
    if name == "join" and args and isinstance(args[0], Iterable):
        return sum(_size(value) + len(subject) for value in args[0])
    if name == "indent":
        return _size(subject) + MAX_WIDTH * str(subject).count("\n")
    if name == "expandtabs":
        return _size(subject) + MAX_WIDTH * str(subject).count("\t")
    if name in _FORMATS:
        if _LARGE_WIDTH.search(str(subject)):
            raise SecurityError("a format with a large or variable width")
        values = [_size(value) for value in (*args, *kwargs.values())]
        return _size(subject) + (str(subject).count("%") + str(subject).count("{")) * max([64, *values])
    return 0

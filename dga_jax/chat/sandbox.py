"""A jinja2 environment for templates of unknown origin: no access to Python, bounded time and size.

A chat template is a program by the author of a checkpoint. jinja2's ImmutableSandboxedEnvironment
hides the internals of Python's objects from it and forbids changes of its arguments, but bounds
neither time nor memory. `Sandbox.render` adds these bounds:

- Each line of the compiled template compares the CPU time of the thread with a deadline, and the
  sizes of the template's variables with `MAX_SIZE`.
- Operators, methods and filters whose result can be much larger than their arguments compute the
  size of the result first.
- The output is counted piece by piece.

The memory of a template that keeps many strings of nearly `MAX_SIZE` is not bounded.
"""

import json
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from datetime import datetime
from types import FrameType
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
from jinja2.filters import FILTERS
from jinja2.utils import Namespace

MAX_SIZE = 16 << 20
"""Bound on the characters of the output and on the size of each string and list of a template."""

_FILE = "<template>"  # The file name of a compiled template's code.
# Filters with large results that chat templates do not use.
_LEFT_OUT = ("batch", "center", "filesizeformat", "pprint", "random", "urlize", "wordwrap")
_PADDING_METHODS = frozenset({"center", "expandtabs", "ljust", "rjust", "zfill"})
_MAX_BITS = 4096  # Of an integer.
_MAX_DIGITS = 64  # Of rounding and of JSON's indentation.
_WIDE_FORMAT = re.compile(r"\d{5,}|\*|\{[^}]*\{")  # A width of five digits, or a computed width.


class TemplateError(ValueError):
  """A template is not valid, failed, refused its arguments, or exceeded a bound."""


class Sandbox:
  """A compiled template.

  Args:
    source: the template.

  Raises:
    TemplateError: the source is not a jinja2 template, or uses a filter that is left out.
  """

  def __init__(self, source: str) -> None:
    environment = _Environment(
      trim_blocks=True,
      lstrip_blocks=True,
      extensions=["jinja2.ext.loopcontrols", _Generation],
    )
    try:
      self._template = environment.from_string(source)
    except jinja2.TemplateSyntaxError as error:
      raise TemplateError(f"Line {error.lineno} is not valid: {error.message}.") from error
    except (MemoryError, RecursionError, SyntaxError, ValueError) as error:
      raise TemplateError(f"It cannot be compiled: {error}.") from error

  def render(self, variables: Mapping[str, Any], *, max_seconds: float = 5.0) -> str:
    """The text that the template makes of the variables.

    Args:
      variables: values by name: strings, numbers, None, and lists and dicts of them.
      max_seconds: bound on the CPU time of the thread.

    Raises:
      TemplateError: the template called raise_exception, failed, or exceeded a bound.
    """
    deadline = time.thread_time() + max_seconds

    def on_line(frame: FrameType, event: str, argument: Any) -> Any:
      del event, argument
      if time.thread_time() > deadline:
        raise TemplateError(f"It runs for more than {max_seconds:g} s CPU time.")
      for value in frame.f_locals.values():
        _check_variable(value)
      return on_line

    def on_call(frame: FrameType, event: str, argument: Any) -> Any:
      del event, argument
      return on_line if frame.f_code.co_filename == _FILE else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
      return "".join(_counted(self._template.generate(variables)))
    except TemplateError:
      raise
    except Exception as error:  # A template can raise any error of Python's operators.
      raise TemplateError(f"It failed: {type(error).__name__}: {error}") from error
    finally:
      sys.settrace(before)


class _Generation(jinja2.ext.Extension):
  """{% generation %} ... {% endgeneration %}, which marks the assistant's text for trainers."""

  tags = {"generation"}  # noqa: RUF012 - the library's declaration

  def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
    """The statements inside, unchanged."""
    next(parser.stream)
    return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(jinja2.sandbox.ImmutableSandboxedEnvironment):
  """The sandbox, with checks of operators, methods and filters."""

  intercepted_binops = frozenset({"+", "*", "**", "%"})

  def __init__(self, **options: Any) -> None:
    super().__init__(**options)
    for name in _LEFT_OUT:
      del self.filters[name]
    self.filters |= {
      "format": _format,
      "indent": _indent,
      "join": _join,
      "replace": _replace,
      "round": _round,
      "tojson": _to_json,
    }
    del self.globals["lipsum"]
    self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

  def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
    """The result of an operator, whose size is checked first."""
    if operator == "**":
      _check_power(left, right)
    elif operator == "%" and isinstance(left, str):
      _check_format(left)
    elif operator == "*":
      _check_product(left, right)
    elif operator == "+" and _is_sized(left) and _is_sized(right):
      _check_size(len(left) + len(right))
    return super().call_binop(context, operator, left, right)

  def call(self, context: Any, function: Any, /, *args: Any, **kwargs: Any) -> Any:
    """The result of a call; the size of the result of a method of strings is checked first."""
    method = getattr(function, "__wrapped__", function)  # jinja2 wraps str.format.
    text, name = getattr(method, "__self__", None), getattr(method, "__name__", None)
    if isinstance(text, str):
      if name in _PADDING_METHODS:
        _check_size(max((arg for arg in args if isinstance(arg, int)), default=0))
      elif name in ("format", "format_map"):
        _check_format(text)
      elif name == "replace":
        _check_replaced(text, *args[:2])
      elif name == "join" and args:
        args = (_checked_items(args[0], text),)
      elif name == "translate":
        raise TemplateError("str.translate is not supported.")
    return super().call(context, function, *args, **kwargs)


def _counted(pieces: Iterable[str]) -> Iterator[str]:
  size = 0
  for piece in pieces:
    size += len(piece)
    _check_size(size)
    yield piece


def _check_variable(value: Any) -> None:
  if type(value) is Namespace:
    for attribute in value._Namespace__attrs.values():
      if _is_sized(attribute):
        _check_size(len(attribute))
  elif _is_sized(value):
    _check_size(len(value))


def _is_sized(value: Any) -> bool:
  return isinstance(value, str | list | tuple)


def _check_size(size: int) -> None:
  if size > MAX_SIZE:
    raise TemplateError(f"It makes a text or list of more than {MAX_SIZE} entries.")


def _check_product(left: Any, right: Any) -> None:
  if isinstance(left, int) and isinstance(right, int):
    _check_bits(left.bit_length() + right.bit_length())
  for sized, count in ((left, right), (right, left)):
    if _is_sized(sized) and isinstance(count, int):
      _check_size(len(sized) * max(0, count))


def _check_power(left: Any, right: Any) -> None:
  if isinstance(left, int) and isinstance(right, int):
    _check_bits(left.bit_length() * abs(right))


def _check_bits(bits: int) -> None:
  if bits > _MAX_BITS:
    raise TemplateError(f"It makes an integer of more than {_MAX_BITS} bits.")


def _check_format(text: str) -> None:
  if _WIDE_FORMAT.search(text):
    raise TemplateError(f"The format {text[:40]!r} has a width that is computed or too large.")


def _check_replaced(text: str, old: Any = "", new: Any = "") -> None:
  if isinstance(old, str) and isinstance(new, str):
    _check_size(len(text) + text.count(old) * len(new))


def _checked_items(items: Any, separator: str) -> list[Any]:
  """The items of `separator.join(items)`, after a check of its size."""
  listed = list(items)
  _check_size(sum(len(separator) + len(str(item)) for item in listed))
  return listed


def _format(value: Any, *args: Any, **kwargs: Any) -> str:
  _check_format(str(value))
  return str(FILTERS["format"](value, *args, **kwargs))


def _indent(text: str, width: int | str = 4, first: bool = False, blank: bool = False) -> str:
  columns = len(width) if isinstance(width, str) else width
  _check_size(len(text) + (1 + text.count("\n")) * columns)
  return str(FILTERS["indent"](text, width, first, blank))


@jinja2.pass_eval_context
def _join(context: Any, items: Any, d: str = "", attribute: str | None = None) -> str:
  # An attribute of an item is shorter than the item's text.
  return str(FILTERS["join"](context, _checked_items(items, d), d, attribute))


@jinja2.pass_eval_context
def _replace(context: Any, text: Any, old: str, new: str, count: int | None = None) -> str:
  _check_replaced(str(text), old, new)
  return str(FILTERS["replace"](context, str(text), old, new, count))


def _round(value: float, precision: int = 0, method: Any = "common") -> float:
  if abs(precision) > _MAX_DIGITS:
    raise TemplateError(f"It rounds to {precision} digits; at most {_MAX_DIGITS} are supported.")
  rounded: float = FILTERS["round"](value, precision, method)
  return rounded


def _to_json(
  value: Any,
  ensure_ascii: bool = False,
  indent: int | None = None,
  separators: tuple[str, str] | None = None,
  sort_keys: bool = False,
) -> str:
  """JSON as chat templates expect it; jinja2's own filter escapes the characters of HTML."""
  if indent is not None and not 0 <= indent <= _MAX_DIGITS:
    raise TemplateError(f"It indents JSON by {indent}; 0 to {_MAX_DIGITS} are supported.")
  return json.dumps(
    value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
  )


def _raise_exception(message: Any) -> NoReturn:
  raise TemplateError(f"It refuses the messages: {message}")


def _strftime_now(pattern: str) -> str:
  _check_format(pattern)
  return datetime.now().astimezone().strftime(pattern)

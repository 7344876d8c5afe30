"""The text of --help: the command's docstring, then its flags in groups, 80 columns wide."""

import sys
import textwrap
from collections.abc import Iterable

from absl import flags

flags.disclaim_key_flags()  # A flag belongs to the module that calls absl, not to this one.

WIDTH = 80
_REQUIRED = "must have a value other than None"  # absl's message for a required flag.
_MULTI = ";\n    repeat this option to specify a list of values"  # absl's note to multi flags.


class FlagGroups:
  """The groups of a command's flags in --help.

  `start` is called between the definitions of flags: a group has the flags that are defined
  between its `start` and the next.
  """

  def __init__(self) -> None:
    self._starts: list[tuple[str, frozenset[str]]] = []

  def start(self, title: str) -> None:
    """Begins a group.

    Args:
      title: the heading of the group.
    """
    self._starts.append((title, frozenset(flags.FLAGS)))

  def title(self, name: str) -> str:
    """The heading of the group of a flag; empty for a flag that no group has.

    Args:
      name: of the flag.
    """
    titles = [title for title, earlier in self._starts if name not in earlier]
    return titles[-1] if titles else ""


def command_help(groups: FlagGroups | None = None) -> str:
  """The docstring of the running command and its flags, in the order of their definition.

  Args:
    groups: of the command's flags; None for one group.
  """
  groups = FlagGroups() if groups is None else groups
  sections: dict[str, list[str]] = {}
  for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0]):
    sections.setdefault(groups.title(flag.name), []).append(_flag_text(flag))
  doc = (sys.modules["__main__"].__doc__ or "").strip()
  head = "Flags, with their defaults after the equals sign:"
  return "\n\n".join([doc, head, *(_section(*one) for one in sections.items())])


def wrap(text: str, indent: str) -> str:
  """A text in lines of at most 80 columns, without breaks inside words.

  Args:
    text: one paragraph.
    indent: the beginning of every line.
  """
  return textwrap.fill(
    text,
    WIDTH,
    initial_indent=indent,
    subsequent_indent=indent,
    break_long_words=False,
    break_on_hyphens=False,
  )


def _section(title: str, texts: Iterable[str]) -> str:
  return "\n".join([f"{title}:", *texts] if title else texts)


def _flag_text(flag: flags.Flag) -> str:
  """The flag with its default, its help and the values that it takes."""
  name = f"  --[no]{flag.name}" if flag.boolean else f"  --{flag.name}"
  text, values = (flag.help or "").removesuffix(_MULTI), flag.parser.syntactic_help
  if choices := getattr(flag.parser, "enum_values", None):
    text = text.removeprefix(f"<{'|'.join(choices)}>: ")
    values = f"one of {', '.join(choices)}"
  if any(_REQUIRED in validator.message for validator in flag.validators):
    values = f"required, {values}" if values else "required"
  is_unset = flag.default is None or flag.default is False or flag.default == []
  default = "" if is_unset else str(flag.default_as_str).strip("'")
  if default and len(f"{name}={default}") > WIDTH:
    values = f"{values}; default: {default.replace(',', ', ')}"
  elif default:
    name += f"={default}"
  return f"{name}\n{wrap(f'{text} ({values})' if values else text, ' ' * 6)}"

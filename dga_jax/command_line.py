"""What all commands share: --help, one-line errors, missing extras and closed pipes."""

import contextlib
import functools
import importlib.metadata
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import get_args, NoReturn, TYPE_CHECKING

from absl import app, flags, logging

from dga_jax.checkpoint_logs import hide_save_errors
from dga_jax.choices import CacheDtypeName, WeightName
from dga_jax.flag_help import command_help, FlagGroups
from dga_jax.unused_gpu import warn_about_unused_gpu

if TYPE_CHECKING:
  from dga_jax.head_budgets import HeadBudgets

_INTERRUPTED = 128 + signal.SIGINT  # What shells report of a command that SIGINT has ended.
_REPEAT_SECONDS = 0.1  # After which a function that ignores exceptions has returned.

flags.disclaim_key_flags()  # --help lists --budgets and --weights with the flags of the command.


def define_budgets() -> flags.FlagHolder[str | None]:
  """The flag --budgets of the commands that load a model."""
  holder: flags.FlagHolder[str | None] = flags.DEFINE_string(
    "budgets",
    None,
    "JSON file with the setting of each KV head, made for this checkpoint (dga_jax.HeadBudgets); "
    "default: the checkpoint's attention.",
  )
  return holder


def define_weights() -> flags.FlagHolder[str | None]:
  """The flag --weights of the commands that load a model."""
  holder: flags.FlagHolder[str | None] = flags.DEFINE_enum(
    "weights",
    None,
    get_args(WeightName),
    "Store the weights of the layers' projections in 8 bits, with a scale for each output channel: "
    "int8, or fp8 (float8_e4m3fn); default: in the dtype of the activations.",
  )
  return holder


def define_cache_dtype() -> flags.FlagHolder[str | None]:
  """The flag --cache_dtype of the commands that generate."""
  holder: flags.FlagHolder[str | None] = flags.DEFINE_enum(
    "cache_dtype",
    None,
    get_args(CacheDtypeName),
    "Store the caches of DGA and of head budgets in 8 bits, with a scale for each key and each "
    "value; the raw tokens of DGA keep the dtype of the activations. Default: the settings of the "
    "model or of --budgets.",
  )
  return holder


def read_budgets(flag: flags.FlagHolder[str | None]) -> "HeadBudgets | None":
  """The budgets in the file of the flag --budgets, or None without the flag.

  Args:
    flag: from `define_budgets`.

  Raises:
    OSError: the file cannot be read.
    ValueError: the file has no budgets.
  """
  if flag.value is None:
    return None
  from dga_jax.head_budgets import read_head_budgets

  return read_head_budgets(flag.value)


def run(main: Callable[[], None], groups: FlagGroups | None = None) -> NoReturn:
  """Parses the flags, calls `main` and exits.

  The exit status is 0 after success and after --help, 1 after an error, and 130 after Ctrl-C.
  Errors that a user can correct are printed as one line: UsageError, ValueError, OSError,
  CheckpointError, FloatingPointError (the model's numbers are not finite), and a missing package of
  an optional dependency.

  Args:
    main: the command, without arguments; its module defines the flags.
    groups: of the flags in --help; None for one group.
  """

  def checked(argv: list[str]) -> None:
    if len(argv) > 1:
      sys.exit(f"error: {argv[1]!r} is not a flag; quote values that contain spaces.")
    if not flags.FLAGS["verbosity"].present:
      logging.set_verbosity(logging.WARNING)  # The checkpoint library logs every read and write.
    hide_save_errors()
    repeat_if_ignored(KeyboardInterrupt, signal.SIGINT)
    warn_about_unused_gpu()
    with closed_pipes_end_quietly():
      try:
        main()
      except BrokenPipeError:
        raise
      except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(_INTERRUPTED)
      except app.UsageError as error:
        sys.exit(f"error: {error} --help lists the flags.")
      except Exception as error:
        exit_with(error)

  app.run(checked, flags_parser=functools.partial(parse_flags, groups=groups))
  raise AssertionError("app.run exits")


def repeat_if_ignored(kind: type[BaseException], number: signal.Signals) -> None:
  """Sends a signal to this process again where Python ignored the exception of its handler.

  Python calls the handler between any two instructions. In some functions, such as JAX's callback
  of the garbage collector, Python prints an exception and continues.

  Args:
    kind: the exception that the handler raises.
    number: the signal.
  """
  show = sys.unraisablehook

  def repeat(unraisable: "sys.UnraisableHookArgs") -> None:
    if unraisable.exc_type is kind:
      threading.Timer(_REPEAT_SECONDS, os.kill, (os.getpid(), number)).start()
    else:
      show(unraisable)

  sys.unraisablehook = repeat


@contextlib.contextmanager
def closed_pipes_end_quietly() -> Iterator[None]:
  """Flushes stdout at the end; exits with status 1 if the reader of stdout, such as head, ended."""
  try:
    yield
    sys.stdout.flush()
  except BrokenPipeError:
    # Python flushes stdout at exit again.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def parse_flags(argv: list[str], groups: FlagGroups | None = None) -> list[str]:
  """Parses flags with absl; --help prints `command_help` and exits with status 0.

  Args:
    argv: the program's name, then its arguments.
    groups: of the flags in --help; None for one group.

  Returns:
    The arguments that are not flags, after the program's name.
  """
  for help_flag in (_Help(groups), _HelpShort(groups)):
    flags.DEFINE_flag(help_flag)
  return app.parse_flags_with_usage(argv)


def exit_with(error: Exception) -> NoReturn:
  """Exits with one line for an error that a user can correct; raises any other error again."""
  if isinstance(error, ModuleNotFoundError) and (hint := missing_extra(error)):
    sys.exit(hint)
  if isinstance(error, OSError | ValueError | FloatingPointError):
    sys.exit(f"error: {error}")
  if isinstance(error, RuntimeError):
    from dga_jax.checkpoint_files import CheckpointError

    if isinstance(error, CheckpointError):
      sys.exit(f"error: {error}")
  raise error


def missing_extra(error: ModuleNotFoundError) -> str | None:
  """The message that names the extra of a missing package; None if no extra installs it."""
  extra = extra_with(error.name or "")
  return extra and f'error: {error}. Install the extra "{extra}": pip install "dga-jax[{extra}]"'


def extra_with(module: str) -> str | None:
  """The optional dependency of dga-jax that installs a module, or None.

  Several extras have some packages. The one with the name of the running command installs all that
  the command needs, so it comes first.
  """
  try:
    requirements = importlib.metadata.requires("dga-jax") or []
  except importlib.metadata.PackageNotFoundError:  # A checkout that is not installed.
    return None
  wanted = _normalised(module.partition(".")[0])
  matches = (
    re.match(r"([\w.-]+).*\bextra == [\"']([\w-]+)[\"']", requirement)
    for requirement in requirements
  )
  extras = [match[2] for match in matches if match and _normalised(match[1]) == wanted]
  command = Path(sys.argv[0])  # The file of the command's module: .../train/main.py.
  named = [extra for extra in extras if extra in (command.stem, command.parent.name)]
  return next(iter(named + extras), None)


def _normalised(name: str) -> str:
  return re.sub(r"[-_.]+", "-", name).lower()


class _Help(app.HelpFlag):
  """--help, with exit status 0."""

  def __init__(self, groups: FlagGroups | None) -> None:
    super().__init__()
    self.allow_override = True
    self._groups = groups

  def parse(self, argument: str | bool) -> None:
    if self._parse(argument):
      with closed_pipes_end_quietly():
        print(command_help(self._groups))
      sys.exit(0)


class _HelpShort(_Help):
  """--helpshort, the same as --help."""

  NAME = "helpshort"
  SHORT_NAME = None

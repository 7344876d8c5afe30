"""The commands of dga-jax: `dga COMMAND`, or `python -m dga_jax COMMAND`."""

import difflib
import importlib.util
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from dga_jax import __version__
from dga_jax.command_line import closed_pipes_end_quietly, exit_with, missing_extra


class Command(NamedTuple):
  """A command: the module that runs it, and one line of help."""

  module: str
  help: str


COMMANDS = {
  "generate": Command("dga_jax.generate_command", "Continue prompts, chat, ask about a document."),
  "serve": Command("dga_jax.serve", "Serve a model over HTTP with OpenAI's interface, and a page."),
  "convert": Command("dga_jax.convert", "Import a Hugging Face or GGUF model, or export a model."),
  "evaluate": Command("dga_jax.evaluate", "Measure perplexity and retrieval on long contexts."),
  "calibrate": Command("dga_jax.calibrate", "Choose a setting of attention for each KV head."),
  "fit_selector": Command("dga_jax.fit_selector", "Fit the choice of focal tokens to a model."),
  "picture": Command("dga_jax.picture", "Draw what each query sees and how groups merge tokens."),
  "picture_sound": Command("dga_jax.picture_sound", "Draw the groups of a model of sound."),
  "smollm2": Command(
    "dga_jax.smollm2", "Download a small model; compare dense attention and head budgets."
  ),
  "train": Command("train.main", "Train a model (from a checkout of dga-jax)."),
}
_HELP = {"--help", "-h", "-help", "--helpshort"}
_NO_TRAINER = """\
dga train: training runs from a checkout of dga-jax, since it is started with the files in configs/.
The dga_jax in {place} is not in a checkout. Clone the repository of dga-jax, and in the clone:

  pip install -e ".[train]"
  dga train --config=configs/quickstart.py --workdir=runs/quickstart"""


def main() -> None:
  """Runs the command that the first argument names."""
  with closed_pipes_end_quietly():
    _dispatch(*sys.argv[1:] or ["help"])


def _dispatch(name: str, *arguments: str) -> None:
  if name in ("help", "--help", "-h"):
    print(usage())
  elif name == "--version":
    print(__version__)
  elif name not in COMMANDS:
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f" Did you mean {close[0]!r}?" if close else ""
    sys.exit(f"dga: there is no command {name!r}.{hint}\n\n{usage()}")
  elif name == "train" and not _find_trainer():
    message = _NO_TRAINER.format(place=Path(__file__).parent)
    if not _HELP.isdisjoint(arguments):
      print(message)
    else:
      sys.exit(message)
  else:
    run(COMMANDS[name].module, arguments)


def usage() -> str:
  """The commands with one line each."""
  lines = [f"  {name:14}{command.help}" for name, command in COMMANDS.items()]
  return "\n".join(
    [
      "Usage: dga COMMAND [FLAG ...]",
      "",
      *lines,
      "",
      "dga COMMAND --help lists the command's flags; dga --version prints the version.",
    ]
  )


def run(module: str, arguments: Sequence[str]) -> None:
  """Runs a module as `python -m` does, with these arguments."""
  sys.argv[:] = [module.replace(".", "/"), *arguments]
  try:
    runpy.run_module(module, run_name="__main__", alter_sys=True)
  except ModuleNotFoundError as error:
    if _HELP.isdisjoint(arguments) or (hint := missing_extra(error)) is None:
      exit_with(error)
    print(hint)  # The flags of the command need the extra, too.


def _find_trainer() -> bool:
  """Whether this package is in a checkout; if so its root becomes importable."""
  root = Path(__file__).parents[1]
  if not (root / "train" / "main.py").is_file():
    return False
  if importlib.util.find_spec("train") is None:
    sys.path.insert(0, str(root))
  return True


if __name__ == "__main__":
  main()

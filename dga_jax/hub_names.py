"""Paths that may be names of models on the Hugging Face hub."""

import re
from pathlib import Path

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def check_exists(path: Path, what: str) -> None:
  """Raises FileNotFoundError if there is nothing at `path`; it names the download of a model.

  Args:
    path: of a folder or file.
    what: should be there.
  """
  if path.exists():
    return
  message = f"There is no {what} at {path}."
  if _HUB_NAME.fullmatch(str(path)):
    name = path.name
    message += (
      f" If {path} is the name of a model on the Hugging Face hub, download it first:"
      f" pip install huggingface_hub && hf download {path} --local-dir {name}"
      f" and give the folder {name} instead."
    )
  raise FileNotFoundError(message)

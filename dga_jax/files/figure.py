"""Writing a plot whole or not at all."""

import os
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from dga_jax.files.whole_file import whole_file


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
  """Writes a figure to a file; the suffix of its name is the format, PNG without a suffix.

  The folder is made. After an error the file is as before.

  Raises:
    OSError: the file could not be written.
    ValueError: matplotlib has no format of this name.
  """
  path = Path(path)
  kind = path.suffix.removeprefix(".").lower() or "png"
  # Matplotlib writes its own web address into a PNG.
  metadata: dict[str, Any] | None = {"Software": None} if kind == "png" else None
  with whole_file(path) as partial:
    figure.savefig(partial, format=kind, metadata=metadata)

"""Whether the data of a run are those that it was started with."""

import itertools

# The parts of a fingerprint, with "-" between them, and what each part is a hash of.
_PARTS = (
  "the content or order of the files of config.data.train_files and config.data.validation_files",
  "the tokenizer",
  "the chat template",
)


def check_fingerprint(found: str, wanted: str | None) -> None:
  """Raises ValueError unless the data are those that the run was started with.

  Args:
    found: the fingerprint of the data.
    wanted: the fingerprint in the run's checkpoint; None for a new run.
  """
  if wanted in (None, found):
    return
  parts = itertools.zip_longest(_PARTS, wanted.split("-"), found.split("-"))
  changed = next(name for name, before, now in parts if before != now)
  raise ValueError(
    f"The data are not those that the run in this workdir was started with: {changed} changed. "
    "Restore them, or give another --workdir to start a new run."
  )

r"""Fits the choice of focal tokens to a model, and writes a new checkpoint.

  dga fit_selector --workdir=runs/smollm2 --documents=books.jsonl \
    --output=runs/smollm2_selector
  dga generate --workdir=runs/smollm2_selector --prompt="Once upon a time"

Under DGA with streaming selection some tokens of each block stay exact. By
default they are the tokens that the block's last query attends to most. The
fitted selector is a linear function of a token's key and value that predicts
how much the token adds to the outputs of later queries under dense attention.

The new checkpoint has attention="dga" with selector="fitted", and otherwise the
weights of --workdir. Blocks, sinks and raw window are those of the checkpoint's
`dga` settings. --length should be the context at which the model will be used.
The command takes a forward pass with dense attention over each row, and 200
steps of Adam for each layer. It needs the extra "calibrate" (scipy, optax).
"""

import dataclasses
from pathlib import Path

from absl import app, flags

from dga_jax import command_line
from dga_jax.files.path_flags import define_path, define_paths

_WORKDIR = define_path("workdir", None, "Folder with the checkpoint.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_DOCUMENTS = define_paths(
  "documents", "Files: .jsonl with id and text (also .xz, .gz, .bz2), or .txt."
)
_MAX_DOCUMENTS = flags.DEFINE_integer("max_documents", 2, "Documents to use.", lower_bound=1)
_ROWS = flags.DEFINE_integer(
  "rows_per_document", 1, "Largest number of rows from one document.", lower_bound=1
)
_LENGTH = flags.DEFINE_integer("length", 4096, "Tokens of a row.", lower_bound=16)
_WINDOW = flags.DEFINE_integer(
  "local_window", None, "Raw blocks before a query's own; default: the checkpoint's.", lower_bound=0
)
_OUTPUT = define_path("output", None, "Folder of the new checkpoint.", required=True)


def main() -> None:
  """Fits, and writes the checkpoint."""
  if not _DOCUMENTS.value:
    raise app.UsageError("dga fit_selector needs --documents.")

  from dga_jax.calibration.selector_fit import fit_selector
  from dga_jax.calibration.selector_weights import save_with_selector, with_selector
  from dga_jax.checkpoint import list_steps, load_config, load_model
  from dga_jax.checkpoint_files import existing_step
  from dga_jax.evaluation.texts import read_documents, token_rows

  output = Path(_OUTPUT.value)
  if list_steps(output):
    raise ValueError(f"--output={output} has a checkpoint already; name another folder.")
  step = existing_step(_WORKDIR.value, _STEP.value)
  model, config, tokenizer = load_model(_WORKDIR.value, step)
  if config.head_budgets is not None:
    raise ValueError(
      "the checkpoint has head budgets, and its heads are in their order. Fit the selector to the "
      "checkpoint from before any budgets were applied, and then apply budgets."
    )
  settings = config.dga
  if _WINDOW.value is not None:
    settings = dataclasses.replace(settings, local_window=_WINDOW.value)
  documents = read_documents(_DOCUMENTS.value)[: _MAX_DOCUMENTS.value]
  rows = token_rows(documents, tokenizer, _LENGTH.value, _ROWS.value)
  fitted = with_selector(model, settings, fit_selector(model, settings, rows[:, :-1]))
  save_with_selector(fitted, load_config(_WORKDIR.value, step), tokenizer, output)
  print(f"{output} holds the model with its selector, fitted to {len(rows)} rows.")


if __name__ == "__main__":
  command_line.run(main)

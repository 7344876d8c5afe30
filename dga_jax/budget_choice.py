"""Several budgets of the same weights: the one for a share of the dense cache."""

from collections.abc import Sequence
from pathlib import Path

from dga_jax.head_budgets import HeadBudgets, read_head_budgets
from dga_jax.model.flops import mean_head_keys

# A file of `dga calibrate --keys=0.25` keeps at most a quarter of its own length. At another length
# sinks, windows and unfinished blocks are another share.
_TOLERANCE = 0.02


def find_budget_files(
  workdir: str | Path, given: str | None, package: Sequence[Path] = ()
) -> list[Path]:
  """The files of budgets to choose from.

  Args:
    workdir: of the model.
    given: paths with commas between them; None for the files budgets*.json in `workdir`.
    package: files of the package for this model, where `workdir` has none.

  Raises:
    FileNotFoundError: `given` is None, and neither `workdir` nor the package has files.
  """
  if given is not None:
    return [Path(path) for path in given.split(",")]
  found = sorted(Path(workdir).glob("budgets*.json")) or list(package)
  if not found:
    raise FileNotFoundError(
      f"{workdir} has no files budgets*.json, one of which --keys would choose. Make them with dga "
      f"calibrate --workdir={workdir} --documents=TEXTS.jsonl --keys=0.25,0.5, or name files: "
      "--budgets=FILE,FILE."
    )
  return found


def choose_budgets(
  paths: Sequence[Path], keys: float, length: int
) -> tuple[Path, HeadBudgets, float]:
  """The budgets with the largest cache that is at most a share of a dense cache.

  Args:
    paths: JSON files of budgets.
    keys: the share, above 0. A share that is larger by 2 % of it counts as equal.
    length: tokens of the sequences whose caches are compared.

  Returns:
    (the file, its budgets, their share of a dense cache of `length` tokens).

  Raises:
    OSError: a file cannot be read.
    ValueError: a file has no budgets, or all budgets exceed the share.
  """
  read = [(path, read_head_budgets(path)) for path in paths]
  found = [(path, budgets, share_of_keys(budgets, length)) for path, budgets in read]
  fitting = [one for one in found if one[2] <= keys * (1 + _TOLERANCE)]
  if not fitting:
    shares = ", ".join(f"{path}: {share:.3f}" for path, _, share in found)
    raise ValueError(
      f"keys is {keys}, and all budgets keep more of {length} tokens ({shares}). Give a larger"
      " share, or budgets that dga calibrate made for this one."
    )
  return max(fitting, key=lambda one: one[2])


def share_of_keys(budgets: HeadBudgets, length: int) -> float:
  """Keys that the caches of all heads hold for `length` tokens, over those of dense caches."""
  return mean_head_keys(budgets.counts(), length) / length

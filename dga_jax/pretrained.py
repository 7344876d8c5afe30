"""Calibrated head budgets for attention="dga" of models that were pretrained with dense attention.

One setting of Dynamic Group Attention for all heads loses recall in such a model. The package has
budgets for SmolLM2-135M (smollm2_budgets_SHARE.json). For other models `dga calibrate` makes them.
"""

from pathlib import Path

from dga_jax.config import RETROFIT
from dga_jax.head_budgets import HeadBudgets, read_head_budgets
from dga_jax.model import ModelConfig

_FOLDER = Path(__file__).parent
# Layers, width, query heads, KV heads, head dim, width of the MLP, vocabulary, RoPE base. The base
# tells SmolLM2 from SmolLM.
_SMOLLM2_135M = (30, 576, 9, 3, 64, 1536, 49152, 100_000.0)
_DEFAULT = "35"


def smollm2_budget_files() -> dict[str, Path]:
  """The files of budgets for SmolLM2-135M by their percentage of a dense cache of 8192 tokens.

  The largest percentage is the first.
  """
  files = {path.stem.rpartition("_")[2]: path for path in _FOLDER.glob("smollm2_budgets_*.json")}
  return dict(sorted(files.items(), key=lambda item: int(item[0]), reverse=True))


def package_budget_files(config: ModelConfig) -> list[Path]:
  """The files of budgets that the package has for an imported model, whatever its attention."""
  return list(smollm2_budget_files().values()) if _is_smollm2(config) else []


def default_budgets(config: ModelConfig) -> HeadBudgets | None:
  """What replaces one setting for all heads in an imported model: budgets that the package has.

  Args:
    config: of a model whose weights come from another program.

  Returns:
    None if the package has none for this model, if the attention is not "dga", or if
    its settings are not `RETROFIT`, those that an import stores.
  """
  if not _is_smollm2(config) or config.attention != "dga" or config.dga != RETROFIT:
    return None
  return read_head_budgets(smollm2_budget_files()[_DEFAULT])


def _is_smollm2(config: ModelConfig) -> bool:
  shapes = (
    config.num_layers,
    config.embed_dim,
    config.num_heads,
    config.num_kv_heads,
    config.head_dim,
    config.mlp_dim,
    config.vocab_size,
    config.rope_base,
  )
  return shapes == _SMOLLM2_135M


def calibration_note(config: ModelConfig, workdir: str | Path) -> str | None:
  """How to calibrate an imported model that follows one setting for all heads; None for others.

  Args:
    config: of a model whose weights come from another program.
    workdir: of the model, for the command.
  """
  if config.attention != "dga" or default_budgets(config) is not None:
    return None
  return (
    'note: attention "dga" gives all heads one setting, and a model that was pretrained with dense'
    " attention then loses recall. Calibrate a setting for each KV head: dga calibrate"
    f" --workdir={workdir} --documents=TEXTS.jsonl --keys=0.35"
  )

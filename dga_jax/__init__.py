"""Dynamic Group Attention for JAX (Zhang et al., ICML 2025, arXiv 2505.22107)."""

import importlib
from typing import Any, TYPE_CHECKING

if TYPE_CHECKING:
  from dga_jax.api import dynamic_group_attention, plan_groups
  from dga_jax.attention.plan import GroupPlan
  from dga_jax.config import DGAConfig
  from dga_jax.explanation import explain
  from dga_jax.head_budgets import HeadBudgets, SinkWindow
  from dga_jax.loading import load
  from dga_jax.text_generation import generate

__version__ = "0.1.0"

__all__ = [
  "DGAConfig",
  "GroupPlan",
  "HeadBudgets",
  "SinkWindow",
  "__version__",
  "dynamic_group_attention",
  "explain",
  "generate",
  "load",
  "plan_groups",
]

# Imported on first use, so that the commands print their help without importing jax.
_MODULES = {
  "DGAConfig": "dga_jax.config",
  "GroupPlan": "dga_jax.attention.plan",
  "HeadBudgets": "dga_jax.head_budgets",
  "SinkWindow": "dga_jax.head_budgets",
  "dynamic_group_attention": "dga_jax.api",
  "explain": "dga_jax.explanation",
  "generate": "dga_jax.text_generation",
  "load": "dga_jax.loading",
  "plan_groups": "dga_jax.api",
}

if not TYPE_CHECKING:

  def __getattr__(name: str) -> Any:
    if name not in _MODULES:
      raise AttributeError(f"module 'dga_jax' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value

  def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

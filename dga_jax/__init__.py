"""Dynamic Group Attention for JAX (Zhang et al., ICML 2025, arXiv 2505.22107)."""

from dga_jax.api import dynamic_group_attention, explain, plan_groups
from dga_jax.attention.plan import GroupPlan
from dga_jax.config import DGAConfig

__all__ = ["DGAConfig", "GroupPlan", "dynamic_group_attention", "explain", "plan_groups"]

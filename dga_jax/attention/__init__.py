"""Dynamic Group Attention: importance → plan → aggregate → attend."""

from dga_jax.attention.attend import dynamic_group_attention, explain
from dga_jax.attention.plan import GroupPlan, plan_groups

__all__ = ["GroupPlan", "dynamic_group_attention", "explain", "plan_groups"]

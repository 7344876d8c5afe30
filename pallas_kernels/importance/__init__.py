"""Importance of keys: the attention that sampled queries pay to each key."""

from pallas_kernels.importance.api import sampled_importance

__all__ = ["sampled_importance"]

"""What sampled queries pay to each key: column sums of a few rows of softmax attention."""

from pallas_kernels.importance.api import sampled_importance

__all__ = ["sampled_importance"]

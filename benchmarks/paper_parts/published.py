"""Figures of the paper (arXiv 2505.22107) and of the authors' answers on OpenReview.

LLaMA2-7B on A800 GPUs, where nothing else is stated.
"""

# Answers, Table II: P_sparse(L, ρ = 0.01), trained model.
P_SPARSE: dict[str, list[float]] = {
  "length": [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
  "WikiText-2": [0.14, 0.68, 0.86, 0.93, 0.94, 0.99, 1.00, 1.00, 0.99, 1.00],
  "SlimPajama": [0.09, 0.65, 0.86, 0.95, 0.97, 0.97, 0.99, 1.00, 1.00, 0.99],
}
# Tables 4, 6, 5: perplexity and accuracy in % after continued pretraining.
GROUP_SIZE: dict[float, tuple[float, float]] = {
  4: (3.20, 70.17), 8: (3.42, 68.33), 16: (3.59, 67.00), 32: (3.77, 65.61), 64: (3.87, 65.00),
}  # fmt: skip
IMPORTANCE_RATE: dict[float, tuple[float, float]] = {
  0.1: (3.59, 67.00), 0.3: (3.43, 68.25), 0.5: (3.27, 69.67), 0.7: (3.22, 70.29),
  0.9: (3.20, 70.58),
}  # fmt: skip
SELECTION = {"global": (3.59, 67.00), "random": (3.60, 66.91)}
# Answers, Table I: KV cache in GB at 4K, 8K, 16K, 32K tokens.
KV_CACHE_GB = {4096: (2, 0.32), 8192: (4, 0.63), 16384: (8, 1.26), 32768: (16, 2.51)}

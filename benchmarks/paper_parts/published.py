"""Figures of the paper (arXiv 2505.22107) and of the authors' answers on OpenReview.

LLaMA2-7B on A800 GPUs, where nothing else is stated.
"""

from typing import NamedTuple

# Answers, Table II: P_sparse(L, ρ = 0.01), trained model.
P_SPARSE: dict[str, list[float]] = {
  "length": [100, 200, 300, 400, 500, 600, 700, 800, 900, 1000],
  "WikiText-2": [0.14, 0.68, 0.86, 0.93, 0.94, 0.99, 1.00, 1.00, 0.99, 1.00],
  "SlimPajama": [0.09, 0.65, 0.86, 0.95, 0.97, 0.97, 0.99, 1.00, 1.00, 0.99],
}


class Published(NamedTuple):
  """A row of Tables 4 to 6, after continued pretraining.

  Attributes:
    perplexity: of the next token.
    accuracy: of the next token in %.
    latency: in milliseconds; None where the table has none.
  """

  perplexity: float
  accuracy: float
  latency: float | None = None


# Tables 4, 6 and 5.
GROUP_SIZE: dict[float, Published] = {
  4: Published(3.20, 70.17, 189.80),
  8: Published(3.42, 68.33, 189.10),
  16: Published(3.59, 67.00, 172.12),
  32: Published(3.77, 65.61, 169.40),
  64: Published(3.87, 65.00, 162.02),
}
IMPORTANCE_RATE: dict[float, Published] = {
  0.1: Published(3.59, 67.00, 172.12),
  0.3: Published(3.43, 68.25, 224.85),
  0.5: Published(3.27, 69.67, 386.36),
  0.7: Published(3.22, 70.29, 465.35),
  0.9: Published(3.20, 70.58, 555.25),
}
SELECTION = {"global": Published(3.59, 67.00), "random": Published(3.60, 66.91)}
# Answers, Table I: KV cache in GB at 4K, 8K, 16K, 32K tokens.
KV_CACHE_GB = {4096: (2, 0.32), 8192: (4, 0.63), 16384: (8, 1.26), 32768: (16, 2.51)}

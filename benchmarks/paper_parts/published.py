"""Figures of the paper (arXiv 2505.22107) and of the authors' answers on OpenReview.

LLaMA2-7B on A800 GPUs, where nothing else is stated. Contexts are in tokens.
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

# m of the paper's other tables.
DEFAULT_M = 16


class LongBench(NamedTuple):
  """Scores of LongBench-E in percent, by kind of task, and the time of a token at 16K.

  Attributes:
    single_document: questions about one document.
    several_documents: questions about several documents.
    summary: summaries.
    few_shot: tasks with examples.
    synthetic: synthetic tasks.
    code: completion of code.
    average: over the six kinds.
    milliseconds: ITL at 16K.
  """

  single_document: float
  several_documents: float
  summary: float
  few_shot: float
  synthetic: float
  code: float
  average: float
  milliseconds: float


# Table 1, after continued pretraining.
LONGBENCH = {
  "dense": LongBench(6.43, 2.37, 13.65, 56.65, 3.04, 48.00, 21.69, 69.70),
  "MInference": LongBench(5.86, 2.65, 14.33, 55.99, 2.63, 48.41, 21.64, 94.34),
  "StreamingLLM": LongBench(4.99, 4.13, 11.51, 45.43, 2.16, 30.38, 16.43, 78.28),
  "LM-Infinite": LongBench(3.54, 2.61, 3.31, 48.97, 1.33, 35.26, 15.84, 102.22),
  "DGA": LongBench(3.61, 3.58, 6.81, 57.90, 1.47, 53.45, 21.14, 28.80),
}
# Table 7: DGA with complementary tokens, and without them.
COMPLEMENTARY = {
  "with": LONGBENCH["DGA"],
  "without": LongBench(6.43, 2.37, 8.47, 53.69, 3.04, 48.00, 20.33, 24.90),
}
# Table 2: exact match in percent, after continued pretraining, by context.
EXACT_MATCH: dict[str, dict[int, float]] = {
  "dense": {4096: 37.2, 8192: 36.4, 16384: 33.8, 32768: 26.8},
  "StreamingLLM": {4096: 30.2, 8192: 25.8, 16384: 22.2, 32768: 20.8},
  "LM-Infinite": {4096: 29.4, 8192: 28.6, 16384: 23.8, 32768: 22.4},
  "MInference": {4096: 29.2, 8192: 24.8, 16384: 23.6, 32768: 17.0},
  "DGA": {4096: 35.0, 8192: 27.4, 16384: 25.6, 32768: 22.6},
}
# Table 3: milliseconds a token, by context.
ITL_MS: dict[str, dict[int, float]] = {
  "dense": {4096: 36.87, 8192: 42.32, 16384: 69.70},
  "MInference": {4096: 93.13, 8192: 93.93, 16384: 94.34},
  "StreamingLLM": {4096: 40.00, 8192: 46.67, 16384: 78.28},
  "StreamingLLM, its authors' code": {4096: 36.16, 8192: 36.97, 16384: 36.87},
  "LM-Infinite": {4096: 49.70, 8192: 64.34, 16384: 102.22},
  "DGA": {4096: 26.26, 8192: 26.87, 16384: 28.79},
}


class MByTask(NamedTuple):
  """Answers: the time of a token and scores of LongBench-E in percent for one m.

  Attributes:
    milliseconds: ITL at 16K.
    summary: summaries.
    single_document: questions about one document.
    several_documents: questions about several documents.
  """

  milliseconds: float
  summary: float
  single_document: float
  several_documents: float


# Answers on dynamic m, by m; m = 1 is dense attention.
ITL_BY_M = {
  1: MByTask(69.7, 13.65, 6.43, 2.37),
  2: MByTask(53.0, 9.53, 5.68, 5.40),
  4: MByTask(38.3, 8.36, 4.93, 4.43),
  8: MByTask(33.5, 7.30, 3.04, 4.74),
  16: MByTask(28.8, 6.81, 3.61, 3.58),
}
# Answers, Table I: share of the time of attention that reordering takes, in percent, by context.
REORDERING_SHARE = {4096: 12.5, 8192: 15.6, 16384: 15.8}

r"""Continued pretraining of SmolLM2-135M at 8192 tokens, one run for each attention kind.

  ./workspace smollm2   # downloads and imports the model
  python -m train.make_facts --texts=books.txt --output=facts.jsonl
  python -m train.main --config=configs/smollm2_continued.py:streaming_quarter --workdir=DIR \
    --config.init_from=MODEL --config.data.train_files="('books.txt','facts.jsonl')"

All runs have the same data, steps and learning rate: 65 536 tokens a step, half of the rows pieces
of books, half of them documents in which facts are told and asked for later. The text after the
colon is one of RUNS, or a JSON file of head budgets for MODEL. With selector="fitted" in the file,
as in those of gates_quarter and budgets_eighth, MODEL is the output of `dga fit_selector`.
`./workspace bench paper --parts=continued` trains and evaluates every run. On a GPU set
XLA_FLAGS=--xla_gpu_enable_triton_gemm=false.

On one H200 1000 steps take 318 seconds with dense attention (208 thousand tokens/s), 253 with
gates_quarter (260 thousand) and 230 with budgets_eighth (286 thousand), and 35 GB of its memory.
The step compiles for 6, 52 and 92 seconds (1, 3 and 5 kinds of layers). Held-out perplexity over
that of dense attention with the same steps and seed: after 1000 steps gates_quarter 1.0036 and
budgets_eighth 1.0123; with --config.num_steps=500 global 1.26, streaming_eighth 1.082,
streaming_quarter 1.025, window_quarter 1.020, budgets_quarter 1.0060, duo_quarter 1.0055,
gates_window_quarter 1.0068, gates_quarter 1.003, budgets_eighth 1.0110 (docs/paper.md).
"""

from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

_LAYERS, _KV_HEADS = 30, 3


def _streaming(group_size: int, local_window: int) -> dict[str, Any]:
  return {
    "selection": "streaming",
    "group_size": group_size,
    "focal_per_block": 2,
    "sink_tokens": 4,
    "local_window": local_window,
  }


# Fields of ModelConfig. "quarter" and "eighth" are the keys of a cache of 8192 tokens, at most 2048
# and 1024 in the mean over heads.
ATTENTION: dict[str, dict[str, Any]] = {
  "dense": {"attention": "dense"},
  "global": {"dga": {"selection": "global"}},  # The paper's: m = 16, γ = 0.1.
  "streaming_quarter": {"dga": _streaming(30, local_window=38)},
  "streaming_eighth": {"dga": _streaming(30, local_window=6)},
  "window_quarter": {
    "attention": "head_budgets",
    "head_budgets": {
      "settings": [{"window": 2044, "sinks": 4}],
      "assignment": [[0] * _KV_HEADS] * _LAYERS,
    },
  },
}
# Runs whose heads have settings of their own. The files say how their full heads were chosen. Those
# with the selector "fitted" need a model from `dga fit_selector`, and are no default of
# `./workspace bench paper`.
_BUDGETS = Path(__file__).parent / "budgets"
DEFAULT_RUNS = (*ATTENTION, "duo_quarter", "budgets_quarter")
RUNS = (*DEFAULT_RUNS, "gates_quarter", "gates_window_quarter", "budgets_eighth")


def get_config(run: str = "streaming_quarter") -> ConfigDict:
  """A run by its name, or by a JSON file of head budgets.

  Args:
    run: one of RUNS, or a path that ends in .json.

  Raises:
    ValueError: no such run.
  """
  if run not in RUNS and not run.endswith(".json"):
    raise ValueError(
      f"run is {run!r}; it must be a JSON file of head budgets or one of {', '.join(RUNS)}."
    )
  budgets = None if run in ATTENTION else str(_BUDGETS / f"{run}.json") if run in RUNS else run
  return ConfigDict(
    {
      **({} if budgets is None else {"budgets": budgets}),
      "learning_rate": 3e-4,
      "warmup_steps": 50,
      "loss_chunk": 1024,
      "log_every": 20,
      "eval_every": 500,
      "eval_batches": 4,
      "checkpoint_every": 500,
      "keep_checkpoints": 1,
      "data": {
        "sequence_length": 8192,
        "max_documents": 1,  # cuDNN's attention supports no packed documents.
        "weights": (0.5, 0.5),
        "train_files": ("books.txt", "facts.jsonl"),
      },
      "model": {
        "vocab_size": 49152,
        "num_layers": _LAYERS,
        "embed_dim": 576,
        "num_heads": 9,
        "num_kv_heads": _KV_HEADS,
        "head_dim": 64,
        "mlp_dim": 1536,
        "rope_base": 100000.0,
        "tie_embeddings": True,
        **ATTENTION.get(run, {}),
      },
    }
  )

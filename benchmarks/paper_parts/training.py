"""Validation loss of small models trained from scratch (Figures 3a and 4), dense against DGA.

A byte-level decoder of two layers learns the source of Python's library. The validation rows come
from modules that are not in the training text. Under global selection later queries choose what
earlier queries see, in training and in validation: its loss is lower than decoding can reach.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.paper_parts.inputs import Inputs, python_source, rounded
from benchmarks.paper_parts.plots import label, make_figure, save
from dga_jax import DGAConfig
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.losses import cross_entropy_from_states
from dga_jax.evaluation.report import markdown
from dga_jax.model import Decoder, ModelConfig

TASK = "training"
_MODEL = ModelConfig(
  vocab_size=256, num_layers=2, embed_dim=64, num_heads=2, num_kv_heads=2, head_dim=32,
  mlp_dim=176, attention="dense", dtype="float32",
)  # fmt: skip
VARIANTS = {
  "dense": _MODEL,
  "DGA global, m = 16, γ = 0.1": dataclasses.replace(
    _MODEL, attention="dga", dga=DGAConfig(min_focal_tokens=0)
  ),
  "DGA streaming, 16 + 2": dataclasses.replace(
    _MODEL, attention="dga", dga=DGAConfig(selection="streaming", focal_per_block=2)
  ),
}


@dataclasses.dataclass(frozen=True)
class Training:
  """Settings of a run.

  Attributes:
    steps: updates of AdamW.
    rows: of a batch.
    length: tokens (bytes) of a row.
    validation_rows: rows of the held-out text.
    every: steps between two validations.
    learning_rate: after a warm-up of 20 steps, constant.
  """

  steps: int = 200
  rows: int = 8
  length: int = 256
  validation_rows: int = 16
  every: int = 20
  learning_rate: float = 2e-3


def make_jobs(
  inputs: Inputs, training: Training | None = None, seeds: Sequence[int] = (0, 1)
) -> Iterator[Job]:
  """One job for each seed and attention kind."""
  del inputs
  training = training or Training()
  for seed in seeds:
    for name, config in VARIANTS.items():
      yield Job(
        fields={"task": TASK, "variant": name, "seed": seed},
        depends_on=[config.to_dict(), dataclasses.asdict(training)],
        ticks=training.steps,
        run=functools.partial(_run, config, training, seed),
        origin="trained from scratch",
      )


def _run(
  config: ModelConfig, training: Training, seed: int, tick: Callable[[], Any]
) -> dict[str, Any]:
  train, held_out = (
    np.frombuffer(document.text.encode(), np.uint8).astype(np.int32) for document in python_source()
  )
  rng = np.random.default_rng(seed)
  validation = _rows(held_out, training.validation_rows, training.length, rng)
  graphdef, params = nnx.split(nnx.jit(lambda: Decoder(config, rngs=nnx.Rngs(seed)))())
  warm_up = optax.linear_schedule(0, training.learning_rate, 20)
  optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(warm_up, b2=0.95))
  state = optimizer.init(params)

  def loss(params: Any, tokens_BxT: jax.Array) -> jax.Array:
    model = nnx.merge(graphdef, params)
    states = model.hidden(tokens_BxT[:, :-1])
    return cross_entropy_from_states(model, states, tokens_BxT[:, 1:]).mean()

  @jax.jit
  def step(params: Any, state: Any, tokens_BxT: jax.Array) -> tuple[Any, Any]:
    updates, state = optimizer.update(jax.grad(loss)(params, tokens_BxT), state, params)
    return optax.apply_updates(params, updates), state

  validate = jax.jit(loss)
  losses = [float(validate(params, validation))]
  for number in range(1, training.steps + 1):
    params, state = step(params, state, _rows(train, training.rows, training.length, rng))
    if number % training.every == 0:
      losses.append(float(validate(params, validation)))
    tick()
  return {"every": training.every, "losses": rounded(np.array(losses), 4)}


def _rows(tokens: np.ndarray, count: int, length: int, rng: np.random.Generator) -> jax.Array:
  starts = rng.integers(0, len(tokens) - length - 1, count)
  return jnp.asarray(np.stack([tokens[start : start + length + 1] for start in starts]))


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes training.png to a folder; returns the table of losses."""
  figure, (axes,) = make_figure(1, "Validation loss of a two-layer model trained from scratch")
  rows = []
  for index, name in enumerate(VARIANTS):
    own = [result for result in results if result["variant"] == name]
    if not own:
      continue
    curves = np.array([result["losses"] for result in own])
    steps = np.arange(curves.shape[1]) * own[0]["every"]
    axes.plot(steps, curves.mean(axis=0), f"C{index}o-", ms=3, label=f"{name}, {len(own)} seeds")
    axes.fill_between(steps, curves.min(axis=0), curves.max(axis=0), color=f"C{index}", alpha=0.2)
    middle = len(steps) // 2
    rows.append(
      [
        name,
        *[
          f"{curves[:, at].mean():.3f} ({', '.join(f'{x:.3f}' for x in curves[:, at])})"
          for at in (middle, -1)
        ],
      ]
    )
  axes.legend(fontsize=8, loc="upper right")
  label(axes, "bytes of Python's library", "step", "nats per byte")
  save(figure, out / "training.png")
  return markdown(["attention", f"step {steps[middle]}", f"step {steps[-1]}"], rows)

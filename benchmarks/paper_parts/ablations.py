"""m, γ, selection and complementary tokens (Tables 4 to 7): quality and times.

The paper trains LLaMA2-7B for 1000 steps with DGA before it measures. Here the weights are those of
the dense model, or of the models that --models names, which were trained with one attention kind
each. Perplexity and accuracy of the next token are measured on the second half of whole sequences.
Under global selection later queries choose what earlier queries see, so decoding computes another
function: the loss of the last tokens is measured in decoding too. --latency measures the times of
reading prompts and of decoding, of all settings in turn.
"""

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.latency import measure_latencies
from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.losses import decoded, fill
from dga_jax.evaluation.variants import Variant

TASK = "ablations"
_CHUNK = 256  # Positions whose logits are computed at a time.
_DECODED = 256  # Last tokens of a row whose loss in decoding is measured.
PRETRAINED = "before training"
TIMES = "times"  # In place of a setting: the times of all settings.


def variants() -> dict[str, DGAConfig | None]:
  """The settings by name; None is dense attention. m = 16 and γ = 0.1 where not stated."""
  return {
    "dense": None,
    "paper": _config(),
    "random focal tokens": _config(selection="random"),
    "no complementary tokens": _config(complementary=False),
    **{f"m = {m}": _config(group_size=m) for m in (4, 64, 8, 32)},
    **{f"γ = {gamma}": _config(importance_rate=gamma) for gamma in (0.5, 0.9, 0.3, 0.7)},
  }


def _config(**changes: Any) -> DGAConfig:
  return DGAConfig(**({"min_focal_tokens": 0} | changes))


def make_jobs(inputs: Inputs) -> Iterator[Job]:
  """One job for each model and setting: a row of each document of the first corpus."""
  settings = inputs.ablation
  corpus, length = inputs.books, settings.length
  rows = inputs.rows(corpus, length, 1)
  for workdir in settings.models or (None,):
    model = PRETRAINED if workdir is None else Path(workdir).name
    for name, config in variants().items():
      variant = _variant(name, config)
      yield Job(
        fields={
          "task": TASK, "model": model, "variant": name, "corpus": corpus, "length": length
        },
        depends_on=[
          variant.config(inputs.family.config, length).to_dict(), rows.sum(axis=1).tolist(),
        ],
        ticks=len(rows),
        run=functools.partial(_run, inputs, workdir, variant, config, rows),
      )  # fmt: skip
    if settings.latency_batch is not None:
      yield _times_job(inputs, workdir, model, rows, settings.latency_batch)


def _variant(name: str, config: DGAConfig | None) -> Variant:
  if config is None:
    return Variant(name, {"attention": "dense"})
  return Variant(name, {"attention": "dga", "dga": vars(config)})


def _times_job(
  inputs: Inputs, workdir: str | None, model: str, rows: np.ndarray, batch: int
) -> Job:
  """The times of all settings of one model for `batch` sequences."""
  length = rows.shape[1] - 1
  every = [_variant(name, config) for name, config in variants().items()]

  def run(tick: Callable[[], Any]) -> dict[str, Any]:
    family = inputs.family if workdir is None else inputs.trained_family(workdir)
    graphdefs = {one.name: family.graphdef(one, length) for one in every}
    prompts = fill(rows[:batch, :-1], batch)
    times = measure_latencies(graphdefs, family.params, prompts)
    tick()
    return {"batch": batch, "times": times}

  return Job(
    fields={
      "task": TASK, "model": model, "variant": TIMES, "corpus": inputs.books, "length": length
    },
    depends_on=[
      [one.config(inputs.family.config, length).to_dict() for one in every], batch,
    ],
    ticks=1,
    run=run,
  )  # fmt: skip


def _run(
  inputs: Inputs,
  workdir: str | None,
  variant: Variant,
  config: DGAConfig | None,
  rows: np.ndarray,
  tick: Callable[[], Any],
) -> dict[str, Any]:
  length = rows.shape[1] - 1
  family = inputs.family if workdir is None else inputs.trained_family(workdir)
  graphdef, params = family.graphdef(variant, length), family.params
  losses, right = [], []
  for row in rows:
    nats_L, right_L = _measure(graphdef, params, row[None])
    losses.append(float(nats_L[length // 2 :].mean()))
    right.append(float(right_L[length // 2 :].mean()))
    tick()
  keys = length
  if config is not None:
    keys = cache_size(config=config, max_length=length, prompt=length).total
  targets = min(_DECODED, length // 2)
  decoded_BxT = np.asarray(decoded(graphdef, params, fill(rows, len(rows)), targets))
  return {
    "loss": losses,
    "accuracy": right,
    "keys": keys,
    "decoded_loss": decoded_BxT.mean(axis=1, dtype=float).tolist(),
  }


@functools.partial(jax.jit, static_argnums=0)
def _measure(graphdef: nnx.GraphDef, params: Any, tokens_1xT: Array) -> tuple[Array, Array]:
  """Cross entropy in nats, and whether the most likely token is the next one, by position."""
  model = nnx.merge(graphdef, params)
  states_LxE = model.hidden(tokens_1xT[:, :-1])[0]

  def at(chunk: tuple[Array, Array]) -> tuple[Array, Array]:
    states_cxE, target_c = chunk
    logits_cxV = model.unembed(states_cxE)
    log_probability = jax.nn.log_softmax(logits_cxV)
    nats_c = -jnp.take_along_axis(log_probability, target_c[:, None], axis=1)[:, 0]
    return nats_c, logits_cxV.argmax(axis=1) == target_c

  chunk = math.gcd(_CHUNK, len(states_LxE))
  chunks = states_LxE.reshape(-1, chunk, states_LxE.shape[1]), tokens_1xT[0, 1:].reshape(-1, chunk)
  nats, right = jax.lax.map(at, chunks)
  return nats.ravel(), right.ravel()

"""Robustness to noise (Figure 3b): change of the predictions under Gaussian noise.

The paper adds Gaussian noise and reports the KL divergence of the predictions. Published summaries
of it do not state where the noise enters. Two places are measured here: the embeddings of the
tokens, and the keys and values of every layer. In both cases the noise is independent, with a
standard deviation that is a multiple of the array's root mean square. The KL divergence compares
the next-token distribution with that of the same attention kind without noise, on the second half
of each row.

A method that keeps fewer keys may change less for that reason alone. Sinks with a window of as many
keys as DGA keeps (γ = 0.1, m = 16) is the control without groups.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from benchmarks._forward import embed, relative_noise, run_layers
from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.plots import label, LINES, make_figure, save
from dga_jax import DGAConfig
from dga_jax.attention.segments import find_documents
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.report import markdown
from dga_jax.evaluation.variants import Variant

TASK = "noise"
PLACES = ("embeddings", "keys and values")
SIZES = (0.1, 0.2, 0.4)
_SEED = 0
_CHUNK = 128  # Positions whose logits are computed at a time.


def variants(length: int) -> list[Variant]:
  """Dense attention, DGA, and the control."""
  settings = {
    f"DGA, m = {m}, γ = {gamma}": DGAConfig(group_size=m, importance_rate=gamma, min_focal_tokens=0)
    for m, gamma in ((16, 0.1), (64, 0.1), (4, 0.1), (16, 0.5))
  }
  paper = settings["DGA, m = 16, γ = 0.1"]
  keys = cache_size(config=paper, max_length=length, prompt=length).total
  dga = [Variant(name, {"attention": "dga", "dga": vars(one)}) for name, one in settings.items()]
  control = Variant("sinks and window", {"attention": "streaming_llm"}, keys)
  return [Variant("dense", {"attention": "dense"}), dga[0], control, *dga[1:]]


def make_jobs(inputs: Inputs, length: int = 512) -> Iterator[Job]:
  """One job for each attention kind, on the first document of each corpus."""
  rows = np.concatenate([inputs.rows(corpus, length, 1)[:1] for corpus in inputs.corpora])
  for variant in variants(length):
    yield Job(
      fields={"task": TASK, "variant": variant.name, "length": length},
      depends_on=[
        variant.config(inputs.family.config, length).to_dict(), rows.sum(axis=1).tolist(),
        {"seed": _SEED, "sizes": SIZES},
      ],
      ticks=len(rows) * (1 + len(SIZES) * len(PLACES)),
      run=functools.partial(_run, inputs, variant, rows),
    )  # fmt: skip


def _run(
  inputs: Inputs, variant: Variant, rows: np.ndarray, tick: Callable[[], Any]
) -> dict[str, Any]:
  graphdef, params = inputs.family.graphdef(variant, rows.shape[1] - 1), inputs.family.params
  divergences: dict[str, list[float]] = {place: [] for place in PLACES}
  clean = []
  for row in rows:
    clean.append(_states(graphdef, params, row[None, :-1], 0.0, 0.0, jax.random.key(_SEED)))
    tick()
  for place in PLACES:
    for size in SIZES:
      sizes = (size, 0.0) if place == "embeddings" else (0.0, size)
      own = []
      for number, (row, states) in enumerate(zip(rows, clean, strict=True)):
        key = jax.random.fold_in(jax.random.key(_SEED), number)
        noisy = _states(graphdef, params, row[None, :-1], *sizes, key)
        own.append(float(_divergence(graphdef, params, states, noisy)))
        tick()
      divergences[place].append(round(float(np.mean(own)), 6))
  return {"sizes": list(SIZES), "divergence": divergences}


@functools.partial(jax.jit, static_argnums=0)
def _states(
  graphdef: nnx.GraphDef,
  params: Any,
  tokens_1xL: Array,
  embedding_noise: Array,
  kv_noise: Array,
  key: Array,
) -> Array:
  """Final states [1, L, E] with noise of the given relative sizes."""
  model = nnx.merge(graphdef, params)
  kind = model.config.make_attention()
  B, L = tokens_1xL.shape
  metadata = kind.prepare(find_documents(B, L, None, None))
  x_BxLxE = embed(model, tokens_1xL)
  x_BxLxE += relative_noise(jax.random.fold_in(key, 0), x_BxLxE, embedding_noise)

  def attend(q: Array, k: Array, v: Array, _: None, layer: Any) -> tuple[Array, None]:
    k_key, v_key = jax.random.split(jax.random.fold_in(key, layer + 1))
    k += relative_noise(k_key, k, kv_noise)
    v += relative_noise(v_key, v, kv_noise)
    return kind.attend(q, k, v, metadata), None

  return run_layers(model, x_BxLxE, attend)[0]


@functools.partial(jax.jit, static_argnums=0)
def _divergence(graphdef: nnx.GraphDef, params: Any, clean: Array, noisy: Array) -> Array:
  """KL(clean ‖ noisy) in nats, mean over the second half of the positions."""
  model = nnx.merge(graphdef, params)
  half = clean.shape[1] // 2

  def at(states: tuple[Array, Array]) -> Array:
    log_p, log_q = (jax.nn.log_softmax(model.unembed(one)) for one in states)
    return (jnp.exp(log_p) * (log_p - log_q)).sum(axis=-1)

  chunk = math.gcd(_CHUNK, half)
  chunks = tuple(one[0, -half:].reshape(-1, chunk, one.shape[-1]) for one in (clean, noisy))
  return jax.lax.map(at, chunks).mean()


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes noise.png to a folder; returns the table."""
  figure, panels = make_figure(2, "Change of SmolLM2-135M's predictions under Gaussian noise")
  rows = []
  for index, result in enumerate(results):
    for axes, place in zip(panels, PLACES, strict=True):
      style = LINES[0] if "DGA" not in result["variant"] else LINES[1]
      values = result["divergence"][place]
      axes.plot(
        result["sizes"], values, style, color=f"C{index}", marker="o", ms=4,
        label=result["variant"],
      )  # fmt: skip
    rows.append(
      [result["variant"], *[f"{x:.4f}" for place in PLACES for x in result["divergence"][place]]]
    )
  for axes, place in zip(panels, PLACES, strict=True):
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(SIZES, [f"{size:g}" for size in SIZES])
    axes.minorticks_off()
    axes.legend(fontsize=7, loc="lower right")
    label(axes, f"noise on {place}", "deviation over root mean square", "KL divergence, nats")
  save(figure, out / "noise.png")
  header = ["attention", *[f"{place}, {size:g}" for place in PLACES for size in SIZES]]
  return markdown(header, rows)

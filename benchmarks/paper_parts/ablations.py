"""m, γ, selection and complementary tokens (Tables 4 to 7) of a pretrained model, without training.

The paper trains LLaMA2-7B for 1000 steps with DGA before it measures; here the weights are those
of the dense model, or those that --workdir names. Perplexity and accuracy of the next token are
measured on the second half of whole sequences. Under global selection later queries choose what
earlier queries see, so decoding computes another function: with --latency the loss of the last
tokens in decoding is measured too, and the times of reading prompts and of decoding.
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

from benchmarks.paper_parts.inputs import Inputs
from benchmarks.paper_parts.latency import measure_latency
from benchmarks.paper_parts.plots import label, make_figure, save
from benchmarks.paper_parts.published import GROUP_SIZE, IMPORTANCE_RATE, SELECTION
from dga_jax import DGAConfig
from dga_jax.cache import cache_size
from dga_jax.evaluation.jobs import Job
from dga_jax.evaluation.losses import decoded, fill
from dga_jax.evaluation.report import markdown
from dga_jax.evaluation.variants import Variant

TASK = "ablations"
_CHUNK = 256  # Positions whose logits are computed at a time.
_DECODED = 256  # Last tokens of a row whose loss in decoding is measured with --latency.


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
  """One job for each setting: a row of each document of the first corpus."""
  settings = inputs.ablation
  corpus, length = inputs.books, settings.length
  rows = inputs.rows(corpus, length, 1)
  for name, config in variants().items():
    overrides: dict[str, Any] = {"attention": "dense"}
    if config is not None:
      overrides = {"attention": "dga", "dga": vars(config)}
    variant = Variant(name, overrides)
    yield Job(
      fields={"task": TASK, "variant": name, "corpus": corpus, "length": length},
      depends_on=[
        variant.config(inputs.family.config, length).to_dict(), rows.sum(axis=1).tolist(),
        *([settings.latency_batch] if settings.latency_batch else []),
      ],
      ticks=len(rows),
      run=functools.partial(_run, inputs, variant, config, rows),
    )  # fmt: skip


def _run(
  inputs: Inputs,
  variant: Variant,
  config: DGAConfig | None,
  rows: np.ndarray,
  tick: Callable[[], Any],
) -> dict[str, Any]:
  length = rows.shape[1] - 1
  graphdef = inputs.family.graphdef(variant, length)
  losses, right = [], []
  for row in rows:
    nats_L, right_L = _measure(graphdef, inputs.family.params, row[None])
    losses.append(float(nats_L[length // 2 :].mean()))
    right.append(float(right_L[length // 2 :].mean()))
    tick()
  keys = length
  if config is not None:
    keys = cache_size(config=config, max_length=length, prompt=length).total
  result = {"loss": losses, "accuracy": right, "keys": keys}
  batch = inputs.ablation.latency_batch
  if batch:
    params = inputs.family.params
    decoded_BxT = [decoded(graphdef, params, row[None], _DECODED) for row in rows]
    result["decoded_loss"] = [float(np.mean(one)) for one in decoded_BxT]
    result["latency"] = measure_latency(graphdef, params, fill(rows[:batch, :-1], batch))
  return result


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


def write(results: Sequence[Mapping[str, Any]], out: Path) -> str:
  """Writes ablations.png to a folder; returns the table."""
  by_name = {result["variant"]: result for result in results}
  published: dict[str, tuple[float, float]] = {"paper": GROUP_SIZE[16]}
  published |= {f"m = {m}": values for m, values in GROUP_SIZE.items() if m != 16}
  published |= {f"γ = {g}": values for g, values in IMPORTANCE_RATE.items() if g != 0.1}
  published["random focal tokens"] = SELECTION["random"]
  rows = []
  for name in variants():
    if name not in by_name:
      continue
    result = by_name[name]
    ratio = _ratio(result, by_name.get("dense"))
    theirs = published.get(name)
    rows.append(
      [
        "m = 16, γ = 0.1" if name == "paper" else name,
        f"{result['keys'] / result['length']:.0%}",
        f"{math.exp(np.mean(result['loss'])):.2f}",
        "" if ratio is None else f"{ratio:.3f}",
        f"{np.mean(result['accuracy']):.1%}",
        *_decoding(result, by_name.get("dense")),
        *(("", "") if theirs is None else (f"{theirs[0]:.2f}", f"{theirs[1]:.1f}%")),
      ]
    )  # fmt: skip
  if "dense" in by_name and "paper" in by_name:
    _plot(by_name, out / "ablations.png")
  header = ["setting", "keys", "perplexity", "over dense", "accuracy"]
  header += ["decoded: over dense", "prompts, ms", "token, ms"]
  return markdown([*header, "paper: perplexity", "paper: accuracy"], rows)


def _decoding(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> tuple[str, str, str]:
  """The perplexity in decoding over that of dense attention, and two times; "" if not measured."""
  if "latency" not in result or dense is None or "latency" not in dense:
    return "", "", ""
  ratio = math.exp(np.mean(result["decoded_loss"]) - np.mean(dense["decoded_loss"]))
  latency = result["latency"]
  prompt, token = (1e3 * latency[name] for name in ("prompt_seconds", "token_seconds"))
  return f"{ratio:.3f}", f"{prompt:.2f}", f"{token:.2f}"


def _ratio(result: Mapping[str, Any], dense: Mapping[str, Any] | None) -> float | None:
  if dense is None:
    return None
  return math.exp(np.mean(result["loss"]) - np.mean(dense["loss"]))


def _plot(by_name: Mapping[str, Mapping[str, Any]], path: Path) -> None:
  figure, panels = make_figure(
    2, "m and γ: loss above the best setting, without training and in the paper"
  )
  tables: tuple[tuple[str, Mapping[float, tuple[float, float]], float, str], ...] = (
    ("m", GROUP_SIZE, 16, "group size m, γ = 0.1"),
    ("γ", IMPORTANCE_RATE, 0.1, "importance rate γ, m = 16"),
  )
  for axes, (symbol, table, default, words) in zip(panels, tables, strict=True):
    names = {value: "paper" if value == default else f"{symbol} = {value}" for value in table}
    own = {value: by_name[name] for value, name in names.items() if name in by_name}
    axes.plot(
      list(own), [math.log(_ratio(result, by_name["dense"]) or 1) for result in own.values()],
      "C0o-", label="here, above dense attention: training-free",
    )  # fmt: skip
    best = min(perplexity for perplexity, _ in table.values())
    axes.plot(
      list(table), [math.log(perplexity / best) for perplexity, _ in table.values()],
      "ks--", mfc="none", label="paper, above its best setting: trained with DGA",
    )  # fmt: skip
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8, loc="upper right")
    label(axes, "", words, "nats per token")
  panels[0].set_xscale("log", base=2)
  panels[0].xaxis.set_major_formatter("{x:.0f}")
  save(figure, path)

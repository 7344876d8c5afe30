"""The engine on four simulated devices gives the tokens of one; run by test_engine_on_mesh.py."""

import re

import jax
import numpy as np
from flax import nnx

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.generation import Engine, Request, Sampling
from dga_jax.model import Decoder, ModelConfig
from dga_jax.serving.launch import parse_mesh


def main() -> None:
  dga = DGAConfig(selection="streaming", group_size=5, sink_tokens=2, local_window=1)
  settings = ("full", dga, SinkWindow(12, sinks=2))
  unequal = HeadBudgets(settings[:2], ((0, 1, 1, 0), (1, 1, 1, 1)))
  equal = HeadBudgets(settings, ((0, 1, 0, 1), (1, 2, 1, 2)), cache_dtype="int8")
  # The devices, and the parts into which they split a cache: 1 where their heads differ.
  for attention, budgets, devices, parts in (
    ("dga", None, 4, 4),
    ("dense", None, 4, 4),
    ("head_budgets", unequal, 4, 1),
    ("head_budgets", equal, 2, 2),
  ):
    config = ModelConfig(
      vocab_size=64,
      num_layers=2 if budgets else 1,  # Budgets differ between layers.
      embed_dim=40,
      num_heads=8,
      num_kv_heads=4,
      head_dim=8,
      mlp_dim=48,
      attention=attention,
      dga=dga,
      head_budgets=budgets,
      dtype="float32",
    )
    model = Decoder(config, rngs=nnx.Rngs(0))
    one, several = (_tokens(model, where) for where in (None, parse_mesh(f"tensor={devices}")))
    assert one[0] == several[0], (attention, one[0], several[0])
    # Keys and values of each device.
    assert parts * several[1] == one[1], (attention, one[1], several[1])


def _tokens(model, mesh):
  """The tokens of five requests, and the bytes of the slots' caches on the first device."""
  logprobs = model.config.head_budgets is None  # Their program reads pieces as `extend` does.
  engine = Engine(
    model,
    slots=2,
    max_length=320,
    prompt_chunk=32,
    cache_bytes=1 << 30,
    logprobs=logprobs,
    mesh=mesh,
  )
  rng, results = np.random.default_rng(0), {}
  first = rng.integers(0, 64, 70).tolist()
  for prompt in (first, [3], first[:50], [*first, 5, 6]):
    engine.submit(Request(prompt, 9, Sampling(temperature=0.0)))
  engine.submit(Request(first, 9, Sampling(temperature=1.0, seed=4)))
  while engine.busy:
    for emitted in engine.step():
      results.setdefault(emitted.request, []).extend(emitted.tokens)
  # The largest gathered arrays are logits, and the queries of all heads for head budgets. All
  # caches and weights are larger.
  for name, most in (("decode", 2 * 64), ("extend 32", 32 * 64), ("score", 32 * 64)):
    if logprobs or name != "score":
      _check_gathers(engine.programs._compiled[name].as_text(), most)
  arrays = [x for x in jax.tree.leaves(engine._state.cache) if x.dtype != np.int32]
  return results, sum(x.addressable_shards[0].data.nbytes for x in arrays)


def _check_gathers(hlo, most):
  for shape in re.findall(r"= \w+\[([\d,]*)\]\S* all-gather\(", hlo):
    assert np.prod([int(size) for size in shape.split(",")]) <= most, shape


if __name__ == "__main__":
  main()

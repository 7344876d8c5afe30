"""The compiler options of decoding on each device, and weights that engines share."""

import dataclasses
import time

import jax
import pytest
from flax import nnx
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from dga_jax.generation import Engine, Request
from dga_jax.generation.compile_jobs import compile_jobs, Job, xla_options
from dga_jax.generation.programs import decode_options
from dga_jax.generation.weights import compute_weights
from dga_jax.model import Decoder
from tests.dga_jax.generation.small_model import CONFIG, GREEDY, prompt_of, run


def on_device(kind: str, platform: str):
  device = AbstractDevice(device_kind=kind, num_cores=1, platform=platform)
  mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
  return jax.sharding.use_abstract_mesh(mesh)


def options_for(kind: str, platform: str) -> dict[str, bool | int]:
  with on_device(kind, platform):
    return decode_options()


@pytest.mark.parametrize(
  ("kind", "platform", "merged"),
  [
    ("NVIDIA H100 80GB HBM3", "gpu", True),
    ("NVIDIA A100-SXM4-40GB", "gpu", True),
    ("Tesla V100-SXM2-16GB", "gpu", False),  # XLA has no Triton products for it
    ("TPU v5", "tpu", False),
  ],
)
def test_products_are_merged_on_gpus_from_ampere_on(kind: str, platform: str, merged: bool):
  assert bool(options_for(kind, platform)) is merged


def test_xla_knows_the_options():
  with on_device("NVIDIA H100 80GB HBM3", "gpu"):
    options = xla_options(Job("decode", lambda: None, (), options=decode_options()))
  assert len(options) == 3
  assert options["xla_gpu_force_compilation_parallelism"] >= 1
  compiled = jax.jit(lambda x: x + 1).lower(1.0).compile(compiler_options=options)
  assert compiled(1.0) == 2.0


def test_engines_of_two_kinds_share_weights():
  dga = Decoder(CONFIG, rngs=nnx.Rngs(0))
  config = dataclasses.replace(CONFIG, attention="dense")
  dense = nnx.merge(nnx.split(Decoder(config, rngs=nnx.Rngs(1)))[0], nnx.state(dga))
  weights = compute_weights(dga)
  sizes = {"slots": 1, "max_length": 80, "prompt_chunk": 32}
  alone, shares = Engine(dense, **sizes), Engine(dense, **sizes, weights=weights)
  request = Request(prompt_of(30), 8, GREEDY)
  assert run(shares, [request])[0][0] == run(alone, [request])[0][0]
  pointers = [x.unsafe_buffer_pointer() for x in jax.tree.leaves(shares.programs._params)]
  assert pointers == [x.unsafe_buffer_pointer() for x in jax.tree.leaves(weights)]


def test_weights_of_another_decoder_are_refused():
  wide = Decoder(dataclasses.replace(CONFIG, mlp_dim=96), rngs=nnx.Rngs(0))
  with pytest.raises(ValueError, match="weights has other parameters"):
    Engine(wide, slots=1, max_length=80, weights=compute_weights(Decoder(CONFIG, rngs=nnx.Rngs(0))))


def test_an_interrupted_compilation_drops_the_jobs_that_have_not_begun(monkeypatch):
  compiled = []

  class Lowered:
    def lower(self, name: str):
      self.name = name
      return self

    def compile(self, options: dict):
      assert options == {}
      time.sleep(0.05)
      compiled.append(self.name)

  def interrupted(jobs):
    yield jobs[0]
    raise KeyboardInterrupt

  monkeypatch.setattr("os.cpu_count", lambda: 1)
  monkeypatch.setattr(jax, "jit", lambda *_, **__: Lowered())
  jobs = [Job(name, print, (name,)) for name in "abcdef"]
  with pytest.raises(KeyboardInterrupt):
    compile_jobs(jobs, interrupted)
  assert len(compiled) < 4

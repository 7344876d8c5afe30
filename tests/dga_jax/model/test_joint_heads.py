"""Prompts and tokens of a layer with all heads in one call, and class by class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from dga_jax.attention.segments import find_documents
from dga_jax.model.attention_kinds import head_budgets, joint_decode
from dga_jax.model.attention_kinds.head_budgets import HeadBudgetsAttention
from pallas_kernels.decode.triton_heads import heads_step_triton
from pallas_kernels.decode.triton_split import Tile
from tests.pallas_kernels.h100 import lower_for_h100
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

B, R, D, M = 2, 3, 16, 64
SETTINGS = (
  "full",
  DGAConfig(selection="streaming", group_size=6, focal_per_block=2, sink_tokens=2, local_window=1),
  SinkWindow(window=9, sinks=3),
  DGAConfig(
    selection="streaming",
    group_size=3,
    focal_per_block=1,
    selector="fitted",
    cache_dtype="int8",
  ),
)
ROWS = ((0, 1, 1, 2, 2, 3), (2, 2, 2, 2, 2, 2))
KIND = HeadBudgetsAttention(HeadBudgets(SETTINGS, ROWS))
PACKED = HeadBudgetsAttention(HeadBudgets(SETTINGS, ROWS, "int8"))
KINDS = pytest.mark.parametrize("kind", [KIND, PACKED], ids=["plain", "int8"])
N = len(ROWS[0])


def tokens(steps):
  rng = np.random.default_rng(0)
  shapes = [(steps, B, N * R, D), (steps, B, N, D), (steps, B, N, D), (steps, B, N)]
  return [jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes]


def decode(kind, layers, steps):
  """Outputs of all steps in the given layers, and the caches."""

  @jax.jit
  def step(caches, token):
    q, k, v, scores = token
    outs = []
    for layer in layers:
      place = kind.layer_index(layer)
      out, caches = kind.decode(q, k, v, caches, place, focal_scores=scores)
      outs.append(out)
    return caches, jnp.stack(outs)

  caches = kind.init_caches(len(ROWS), B, M, N, D, jnp.float32)
  return jax.lax.scan(step, caches, tokens(steps))


@KINDS
def test_interpreted_kernel_decodes_as_the_classes(
  kind: HeadBudgetsAttention, monkeypatch: pytest.MonkeyPatch
):
  steps = 40  # Blocks are completed, and rings wrap around.
  wanted_caches, wanted = decode(kind, (0, 1), steps)
  interpreted = functools.partial(
    heads_step_triton, tile=Tile(entries=16, slots=40), interpret=True
  )
  calls = []

  def kernel(*args, **options):
    calls.append(args)
    return interpreted(*args, **options)

  monkeypatch.setattr(joint_decode, "heads_step", kernel)
  monkeypatch.setattr(joint_decode, "has_heads_kernel", lambda *_: True)
  caches, got = decode(kind, (0, 1), steps)
  assert len(calls) == 2  # One for each layer.
  np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)
  for x, y in zip(jax.tree.leaves(caches), jax.tree.leaves(wanted_caches), strict=True):
    np.testing.assert_allclose(
      x.astype(jnp.float32),
      y.astype(jnp.float32),
      rtol=1e-4,
      atol=1 if x.dtype == jnp.int8 else 1e-5,
    )


@pytest.mark.parametrize("lengths", [None, (37, 21)])
def test_a_joint_prompt_has_the_output_and_the_caches_of_the_classes(
  monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int] | None
):
  L = 37
  q, k, v, scores = (jnp.moveaxis(x, 0, 1) for x in tokens(L))
  documents = find_documents(B, L, None if lengths is None else jnp.asarray(lengths), None)

  def prefill():
    @jax.jit
    def run(q, k, v, scores, documents):
      caches = KIND.init_caches(len(ROWS), B, M, N, D, jnp.float32)
      heads = KIND.at_layer(KIND.layer_index(0))
      return heads.prefill_into(
        caches, q, k, v, KIND.prepare(documents), max_length=M, focal_scores=scores
      )

    return run(q, k, v, scores, documents)

  wanted = prefill()
  monkeypatch.setattr(head_budgets, "attends_jointly", lambda *_: True)
  got = prefill()
  for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
    np.testing.assert_allclose(x, y, rtol=1e-4, atol=1 if x.dtype == jnp.int8 else 1e-5)


@KINDS
def test_a_gpu_decodes_a_layer_with_two_kernels_and_copies_no_heads(kind: HeadBudgetsAttention):
  caches = jax.eval_shape(lambda: kind.init_caches(len(ROWS), B, M, N, D, jnp.bfloat16))
  q, k, v, scores = (
    jax.ShapeDtypeStruct(x.shape[1:], jnp.bfloat16 if i < 3 else x.dtype)
    for i, x in enumerate(tokens(1))
  )

  def step(q, k, v, scores, caches):
    return kind.decode(q, k, v, caches, kind.layer_index(0), focal_scores=scores)

  program = lower_for_h100(step, q, k, v, scores, caches)
  assert program.count("custom_call @__gpu$xla.gpu.triton") == 2
  assert "decode_heads" in program
  assert "stablehlo.slice" not in program
  assert "stablehlo.concatenate" not in program


@pytest.mark.gpu
@pytest.mark.parametrize("cache_dtype", [None, "int8", "float8_e4m3fn"])
def test_a_gpu_decodes_all_heads_as_exactly_as_the_classes(
  cache_dtype: str | None, monkeypatch: pytest.MonkeyPatch
):
  """After a prompt of 24 tiles heads have many programs. Blocks are completed and rings wrap."""
  L, steps, row = 1500, 40, (0, 1, 1, 2, 2, 3)
  blocks = DGAConfig(
    selection="streaming", group_size=14, focal_per_block=2, sink_tokens=2, local_window=5
  )
  fitted = DGAConfig(selection="streaming", group_size=30, selector="fitted", cache_dtype="int8")
  settings = ("full", blocks, SinkWindow(window=700, sinks=3), fitted)
  kind = HeadBudgetsAttention(HeadBudgets(settings, (row,), cache_dtype))
  rng = np.random.default_rng(0)
  shapes = [(L + steps, B, N * R, 64), (L + steps, B, N, 64), (L + steps, B, N, 64)]
  *qkv, scores = (rng.normal(size=shape) for shape in [*shapes, (L + steps, B, N)])

  def outputs(dtype, *, jointly: bool):
    monkeypatch.setattr(joint_decode, "has_heads_kernel", lambda *_: jointly)

    @jax.jit
    def run(*inputs):
      caches = kind.init_caches(1, B, L + steps, N, 64, dtype)
      *prompt, prompt_scores = (jnp.moveaxis(x[:L], 0, 1) for x in inputs)
      place = kind.layer_index(0)
      _, caches = kind.at_layer(place).prefill_into(
        caches,
        *prompt,
        kind.prepare(find_documents(B, L, None, None)),
        max_length=L + steps,
        focal_scores=prompt_scores,
      )

      def step(caches, token):
        *qkv, scores = token
        out, caches = kind.decode(*qkv, caches, place, focal_scores=scores)
        return caches, out

      return jax.lax.scan(step, caches, [x[L:] for x in inputs])[1]

    return run(*(jnp.asarray(x, dtype) for x in qkv), jnp.asarray(scores, jnp.float32))

  with jax.default_matmul_precision("highest"):
    exact = outputs(jnp.float32, jointly=False)
  plain = outputs(jnp.bfloat16, jointly=False)
  got = outputs(jnp.bfloat16, jointly=True)
  for n in range(N):
    of_head = (x[:, :, n * R : (n + 1) * R] for x in (got, exact, plain))
    got_n, exact_n, plain_n = of_head
    assert_close(got_n, exact_n, terms=L + steps, plain=plain_n, name=f"{settings[row[n]]}")

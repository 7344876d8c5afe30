"""On a GPU the kernels of head settings and encoders compute the reference and its gradients."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dga_jax import DGAConfig, HeadBudgets, SinkWindow
from tests.dga_jax.attention.cases import arrays, run
from tests.rounding import assert_close

pytestmark = pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")

_FITTED = DGAConfig(
  selection="streaming",
  selector="fitted",
  group_size=30,
  focal_per_block=2,
  sink_tokens=4,
  local_window=3,
  max_documents=4,
)
SETTINGS = ("full", _FITTED, SinkWindow(200, sinks=4), SinkWindow(77, sinks=0))
# B, L, H, N, D: query heads share a KV head, or not; no length is a multiple of a tile.
SHAPES = {"grouped": (2, 1000, 12, 4, 64), "one_each": (1, 1531, 4, 4, 128)}


BIDIRECTIONAL = {
  "streaming": DGAConfig(
    causal=False,
    selection="streaming",
    selector="fitted",
    group_size=30,
    focal_per_block=2,
    sink_tokens=4,
    local_window=1,
    max_documents=4,
  ),
  "random": DGAConfig(
    causal=False, selection="random", group_size=16, min_focal_tokens=0, max_documents=4
  ),
}


def documents(B: int, L: int) -> dict[str, Any]:
  """Rows with padding, and with two documents."""
  ids = (np.arange(L) >= 400).astype(np.int32) * np.ones((B, 1), np.int32)
  return {"lengths": np.full(B, L - 13, np.int32), "segment_ids": ids}


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("shape", SHAPES)
def test_kernels_of_all_settings_are_as_exact_as_xla(shape: str, rows: str):
  B, L, H, N, D = SHAPES[shape]
  budgets = HeadBudgets(SETTINGS, ((0, 1, 2, 3),))
  scores = jax.random.normal(jax.random.key(9), (B, L, N))
  given = {"config": budgets, "focal_scores": scores} | (
    documents(B, L) if rows == "packed" else {}
  )
  inputs = arrays(5, B, L, H, N, D, jnp.bfloat16)
  with jax.default_matmul_precision("highest"):
    exact = [x.astype(jnp.float32) for x in inputs]
    want = run(*exact, implementation="reference", **given)
  kernels = run(*inputs, implementation=None, **given)
  plain = run(*inputs, implementation="xla", **given)
  results = zip(("out", "dq", "dk", "dv"), kernels, plain, want, strict=True)
  for name, got, other, value in results:
    for head in range(value.shape[2]):
      assert_close(
        got[:, :, head],
        value[:, :, head],
        terms=L,
        plain=other[:, :, head],
        factor=2 if name == "out" else 3,
        name=f"{name} of head {head}",
      )


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend is deprecated")
@pytest.mark.parametrize("implementation", ["mosaic_gpu", "triton"])
@pytest.mark.parametrize("rows", ["whole", "packed"])
@pytest.mark.parametrize("name", BIDIRECTIONAL)
def test_bidirectional_attention_is_as_exact_as_xla(name: str, rows: str, implementation: str):
  config = BIDIRECTIONAL[name]
  B, L, H, N, D = SHAPES["grouped"]
  given: dict[str, Any] = documents(B, L) if rows == "packed" else {}
  if config.selector == "fitted":
    given["focal_scores"] = jax.random.normal(jax.random.key(9), (B, L, N))
  inputs = arrays(5, B, L, H, N, D, jnp.bfloat16)
  with jax.default_matmul_precision("highest"):
    exact = [x.astype(jnp.float32) for x in inputs]
    want = run(*exact, config=config, implementation="reference", **given)
  kernels = run(*inputs, config=config, implementation=implementation, **given)
  plain = run(*inputs, config=config, implementation="xla", **given)
  results = zip(("out", "dq", "dk", "dv"), kernels, plain, want, strict=True)
  for index, (what, got, other, value) in enumerate(results):
    assert_close(got, value, terms=L, plain=other, factor=3 if index else 2, name=what)

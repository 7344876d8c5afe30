"""Variants of a model: allowed overrides, cache budgets, and the count of keys."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from dga_jax import HeadBudgets, SinkWindow
from dga_jax.cache import cache_size
from dga_jax.config import DGAConfig
from dga_jax.evaluation.variants import read_variants, Variant
from tests.dga_jax.evaluation.tiny import CONFIG, family


def test_settings_of_a_variant_replace_those_of_the_model() -> None:
  config = Variant("v", {"dga": {"selection": "global", "sink_tokens": 3}}).config(CONFIG, 64)
  assert config.dga == DGAConfig(selection="global", sink_tokens=3)
  assert Variant("v").config(CONFIG, 64) == CONFIG


def test_keys_set_a_budget() -> None:
  number = Variant("v", {"attention": "streaming_llm"}, keys=40).config(CONFIG, 64)
  share = Variant("v", {"attention": "streaming_llm"}, keys=0.25).config(CONFIG, 64)
  assert (number.streaming_llm.window, share.streaming_llm.window) == (36, 12)


@pytest.mark.parametrize(
  ("variant", "message"),
  [
    (
      Variant("v", {"num_layers": 1}),
      r"variant 'v' sets 'num_layers'; a variant may set attention",
    ),
    (Variant("v", {"dga": {"selektion": "global"}}), r"Did you mean .*dga\.selection"),
    (Variant("v", {"attention": "dense"}, keys=0.5), "attention='dense' has no budget"),
  ],
)
def test_invalid_variants_are_errors(variant: Variant, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    variant.config(CONFIG, 64)


def test_variants_from_json_and_from_a_file(tmp_path: Path) -> None:
  text = json.dumps([{"name": "a"}, {"name": "b", "keys": 0.5, "attention": "streaming_llm"}])
  (tmp_path / "variants.json").write_text(text)
  expected = [Variant("a"), Variant("b", {"attention": "streaming_llm"}, 0.5)]
  assert read_variants(text) == read_variants(str(tmp_path / "variants.json")) == expected


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("[", "is not JSON"),
    ("[]", "with at least one entry"),
    ('[{"attention": "dense"}]', 'must be an object with a "name"'),
    ('[{"name": "a"}, {"name": "a"}]', "has a name twice"),
    ('[{"name": "a", "keys": "half"}]', "keys of variant 'a' is 'half'"),
  ],
)
def test_invalid_json_of_variants_is_an_error(text: str, message: str) -> None:
  with pytest.raises(ValueError, match=message):
    read_variants(text)


@pytest.mark.parametrize(
  ("overrides", "keys"),
  [
    ({"attention": "dense"}, 96),
    ({"attention": "sliding_window", "sliding_window": {"window": 20}}, 20),
    ({"attention": "streaming_llm", "streaming_llm": {"sinks": 4, "window": 500}}, 96),
    ({}, cache_size(config=CONFIG.dga, max_length=96).total),
    (
      {"dga": {"selection": "global", "group_size": 4, "min_focal_tokens": 8}},
      cache_size(
        config=DGAConfig(group_size=4, min_focal_tokens=8), max_length=96, prompt=96
      ).total,
    ),
  ],
)
def test_keys_are_counted_in_the_cache(overrides: dict, keys: int) -> None:
  models, variant = family(), Variant("v", overrides)
  budget = models.budget(variant, 96)
  assert budget.keys == keys
  assert budget.share == keys / 96
  tokens = np.zeros((1, 96), np.int32)
  _, cache = models.model(variant, 96).prefill(tokens, max_length=96)
  held = [x.nbytes for x in jax.tree.leaves(cache.layers) if x.dtype == np.float32]
  assert budget.bytes == sum(held)


def test_entries_of_8_bits_are_counted_with_their_scales() -> None:
  rows = ((0, *[1] * (CONFIG.num_kv_heads - 1)),) * CONFIG.num_layers
  budgets = HeadBudgets(("full", SinkWindow(8)), rows, "int8")
  sets = {"attention": "head_budgets", "head_budgets": budgets.to_dict()}
  tokens = CONFIG.num_layers * (96 + (CONFIG.num_kv_heads - 1) * (8 + 4))
  assert family().budget(Variant("v", sets), 96).bytes == tokens * 2 * (CONFIG.head_dim + 4)


def test_eviction_counts_its_scores() -> None:
  settings = {"heavy": 10, "recent": 6, "interval": 4}
  variant = Variant("v", {"attention": "top_k_eviction", "top_k_eviction": settings})
  # 20 entries, each with a key and a value of 8 channels and one score.
  assert family().budget(variant, 96).keys == 20 * (16 + 1) / 16


def test_heads_in_the_order_of_budgets_take_no_others() -> None:
  rows = ((0, *[1] * (CONFIG.num_kv_heads - 1)),) * CONFIG.num_layers
  own = HeadBudgets(("full", SinkWindow(8)), rows)
  base = dataclasses.replace(CONFIG, head_budgets=own)
  sets = {"attention": "head_budgets", "head_budgets": own.to_dict()}
  assert Variant("v", sets).config(base, 64).head_budgets == own
  assert Variant("v", {"attention": "dense"}).config(base, 64).head_budgets == own
  assert Variant("v", sets).config(CONFIG, 64).head_budgets == own
  others = HeadBudgets(("full", SinkWindow(9)), rows).to_dict()
  with pytest.raises(ValueError, match=r"variant 'v' sets head_budgets.*--budgets=FILE"):
    Variant("v", {"head_budgets": others}).config(base, 64)

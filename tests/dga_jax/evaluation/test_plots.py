"""Plots: titles, axes that contain every value, intervals, legible numbers."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure

from dga_jax.evaluation import plots, report
from train import plots as train_plots

ORIGIN = "runs/model, step 4"
LEVELS = {"dense": 2.5, "DGA, a quarter": 2.55, "random, a quarter": 4.6}


def perplexity(variant: str, error: float | None) -> dict[str, Any]:
  level = LEVELS[variant]
  share = 1.0 if variant == "dense" else 0.25
  pieces = [
    {"from": start, "to": start + 64, "loss": level + 0.3 / (1 + start), "standard_error": error}
    for start in (0, 64, 128, 192)
  ]
  return {
    "task": "perplexity",
    "variant": variant,
    "length": 256,
    "origin": ORIGIN,
    "perplexity": math.exp(level),
    "standard_error": error,
    "by_position": pieces,
    "last": {
      "targets": 32,
      "teacher_forced_loss": level,
      "decoded_loss": level,
      "standard_error": error,
      "measured_by_decoding": True,
    },
    "restart": [{"context": 64, "loss": level + 0.3, "standard_error": error}],
    "budget": {"keys": 256 * share, "share": share},
  }


def retrieval(variant: str, length: int) -> dict[str, Any]:
  found = {"hits": 3, "samples": 4, "share": 0.75, "low": 0.3, "high": 0.95}
  return {
    "task": "retrieval",
    "puzzle": "passkey",
    "variant": variant,
    "length": length,
    "origin": ORIGIN,
    "budget": {"keys": 64, "share": 0.25},
    "by_depth": [{"depth": depth, **found} for depth in (0.0, 0.5, 1.0)],
    **found,
  }


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> dict[str, Figure]:
  """The figures by the names of the files that they are saved to."""
  figures: dict[str, Figure] = {}

  def keep(figure: Figure, path: Path) -> None:
    figure.draw_without_rendering()
    figures[path.name] = figure

  for module in (plots, train_plots):
    monkeypatch.setattr(module, "save_figure", keep)
  return figures


def assert_all_values_are_inside(figure: Figure) -> None:
  for axes in figure.axes:
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    for line in axes.get_lines():
      x, y = np.asarray(line.get_xdata(), float), np.asarray(line.get_ydata(), float)
      assert ((bottom <= y) & (y <= top)).all(), line.get_label()
      if line.get_transform() == axes.transData:
        assert ((left <= x) & (x <= right)).all(), line.get_label()


@pytest.mark.parametrize("error", [0.05, None])
def test_perplexity(error: float | None, drawn: dict[str, Figure], tmp_path: Path) -> None:
  report.write("perplexity", [perplexity(variant, error) for variant in LEVELS], tmp_path)
  kinds = {
    "perplexity_by_share_256.png": "Perplexity by share of keys",
    "perplexity_by_position_256.png": "Perplexity by position",
    "restart_256.png": "Loss by context",
  }
  assert drawn.keys() == kinds.keys()
  for name, kind in kinds.items():
    assert drawn[name].axes[0].get_title() == f"{kind} · {ORIGIN} · 256 tokens"
    assert_all_values_are_inside(drawn[name])
  by_position = drawn["perplexity_by_position_256.png"].axes[0]
  assert by_position.get_yscale() == "log"  # random is eight times worse.
  assert len(by_position.collections) == (0 if error is None else len(LEVELS))
  if error is not None:
    (band,) = (area for area in by_position.collections[:1])
    vertices = band.get_paths()[0].vertices
    assert vertices[:, 1].min() == pytest.approx(math.exp(2.5 + 0.3 / 193 - 1.959964 * 0.05))


def test_close_values_have_a_linear_axis(drawn: dict[str, Figure], tmp_path: Path) -> None:
  close = [perplexity(variant, 0.05) for variant in list(LEVELS)[:2]]
  report.write("perplexity", close, tmp_path)
  assert drawn["perplexity_by_position_256.png"].axes[0].get_yscale() == "linear"


def test_several_lengths_are_heat_maps(drawn: dict[str, Figure], tmp_path: Path) -> None:
  results = [retrieval(variant, length) for variant in LEVELS for length in (256, 512)]
  report.write("retrieval", results, tmp_path)
  maps = drawn["passkey_by_depth.png"]
  assert maps.get_suptitle() == f"passkey, by depth · {ORIGIN} · 256 to 512 tokens"
  assert [len(axes.get_images()) for axes in maps.axes[:3]] == [1, 1, 1]
  assert {text.get_text() for text in maps.axes[0].texts} == {"75"}
  assert_all_values_are_inside(drawn["passkey.png"])


def test_one_length_is_no_heat_map(drawn: dict[str, Figure], tmp_path: Path) -> None:
  report.write("retrieval", [retrieval(variant, 256) for variant in LEVELS], tmp_path)
  (axes,) = drawn["passkey_by_depth.png"].axes
  assert not axes.get_images()
  assert axes.get_title() == f"passkey, by depth · {ORIGIN} · 256 tokens"
  assert axes.get_xlabel() == "Depth of the answer in the prompt"
  assert len(axes.containers) == len(LEVELS)  # Lines with bars.
  assert_all_values_are_inside(drawn["passkey_by_depth.png"])
  assert [tick.get_text() for tick in drawn["passkey.png"].axes[0].get_xticklabels()] == ["256"]


@pytest.mark.parametrize("errors", [[0.1, 0.2], None])
def test_changes_by_layer_have_their_errors(
  errors: list[float] | None, drawn: dict[str, Figure], tmp_path: Path
) -> None:
  plots.plot_by_layer(
    {"one layer": [0.01, -0.02]},
    tmp_path / "layers.png",
    y_label="Loss",
    title="Ablation",
    baselines={"no change": 0.0},
    standard_errors={"one layer": errors},
  )
  (axes,) = drawn["layers.png"].axes
  (bars,) = axes.containers[0][2]
  ends = np.array([segment[:, 1] for segment in bars.get_segments()])
  half = 1.959964 * np.array(errors or [0, 0])
  np.testing.assert_allclose(ends[:, 1] - ends[:, 0], 2 * half, atol=1e-12)


def test_shares_cover_0_to_1(drawn: dict[str, Figure], tmp_path: Path) -> None:
  points = report.by_method([retrieval("DGA, a quarter", 256)], report.passkey_values)
  assert points == {"DGA": [plots.Point(0.25, 0.75, 0.3, 0.95)]}
  plots.plot_against_share(
    points, tmp_path / "share.png", y_label="Found", title="Passkeys", from_0_to_1=True
  )
  (axes,) = drawn["share.png"].axes
  assert axes.get_yscale() == "linear"
  assert axes.get_ylim()[0] < 0
  assert axes.get_ylim()[1] > 1


def test_many_variants_have_distinct_styles() -> None:
  styles = [plots._style(place) for place in range(13)]
  assert len({(style["color"], style["marker"]) for style in styles}) == 13


def test_points_at_the_same_share_are_side_by_side(
  drawn: dict[str, Figure], tmp_path: Path
) -> None:
  same = [plots.Point(0.125, 0.5, 0.4, 0.6)]
  methods = {"dense": [plots.Point(1.0, 1.0)], "DGA": same, "random": same}
  plots.plot_against_share(methods, tmp_path / "same.png", y_label="Found", title="Passkeys")
  (axes,) = drawn["same.png"].axes
  dga, other = (bars[0].get_xdata()[0] for bars in axes.containers)
  assert dga < 0.99 * other
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ["12.5 %"]


def test_dense_alone_has_one_tick(drawn: dict[str, Figure], tmp_path: Path) -> None:
  points = {"dense": [plots.Point(1.0, 1.0)]}
  plots.plot_against_share(points, tmp_path / "dense.png", y_label="Found", title="Passkeys")
  (axes,) = drawn["dense.png"].axes
  assert [tick.get_text() for tick in axes.get_xticklabels()] == ["100 %"]
  assert axes.get_xlim()[1] < 1.5


def contrast(a: float, b: float) -> float:
  return (max(a, b) + 0.05) / (min(a, b) + 0.05)


@given(st.tuples(*[st.floats(0, 1)] * 3))
def test_numbers_are_legible_on_every_colour(colour: tuple[float, float, float]) -> None:
  linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour]
  luminance = float(np.dot([0.2126, 0.7152, 0.0722], linear))
  text = {"black": 0.0, "white": 1.0}[plots.text_colour(colour)]
  assert contrast(luminance, text) >= 4.5  # WCAG 2.1, level AA.


def test_the_titles_of_a_run(drawn: dict[str, Figure], tmp_path: Path) -> None:
  records: list[Mapping[str, Any]] = [{"step": step, "loss": 5 / step} for step in (1, 2, 3)]
  records.append({"step": 3, "eval_loss": 2.0, "eval_loss_by_position": {"0": 2.5, "16": 1.5}})
  lines: Callable[[Mapping[str, Any]], str] = json.dumps
  (tmp_path / "metrics.jsonl").write_text("".join(f"{lines(record)}\n" for record in records))
  train_plots.plot_run(tmp_path, title="mine · dga · 32 tokens")
  assert drawn["loss.png"].axes[0].get_title() == "Loss · mine · dga · 32 tokens"
  positions = drawn["loss_by_position.png"].axes[0].get_title()
  assert positions == "Held-out loss by position · mine · dga · 32 tokens"
  for figure in drawn.values():
    assert_all_values_are_inside(figure)

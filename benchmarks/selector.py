"""Perplexity of a pretrained model under each choice of focal tokens, at equal keys.

  python -m dga_jax.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  python -m benchmarks.selector --workdir=runs/smollm2 --fit_documents=some.jsonl \
    --documents=others.jsonl --lengths=2048 --settings=30+2:4 --out=runs/selector.jsonl

The selector is fitted to --fit_documents. Then every choice selects the focal tokens of the same
blocks in rows of --documents, in all layers:

  last_query   the attention of the block's last query (`DGAConfig.selector`)
  accumulated  the attention of all queries of the block, each over the block's earlier tokens
  expected     expected attention, with the queries up to the block's end
  random       drawn
  fitted       the fitted selector
  oracle       the mean attention of later queries beyond the raw window, which decoding cannot know

Other forms of the selector, fitted to the same rows, join --choices:

  ridge, ridge_value         as fitted, on standardised features; the target is the attention, or
                             the attention times the norm of the value
  ridge_hidden, ridge_place  more features: the layer's normalised input, or the place in the block
  listwise, listwise_hidden  cross entropy of the block's attention instead of squared error
  mlp, mlp_hidden            a small MLP per head beside the linear form, also by cross entropy

CHOICE/scores, CHOICE/mean and CHOICE/oracle merge the members of a group by the softmax of the
choice's scores, by their mean, or by the oracle's attention, instead of the last query's attention.

The table has the perplexity of the second half of the rows over that of dense attention. With
last_query and oracle among --choices it also has the share that a choice removes of the loss
between these two. Each result is appended to OUT when it is measured, and the same command
continues an interrupted run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jaxtyping import Int

from benchmarks._selector_forms import collect, fit_listwise, fit_ridge, Form, linear_form, sizes
from benchmarks._selector_program import CHOICES, dense_loss, MERGES, second_half_loss
from benchmarks.timing import environment
from dga_jax.calibration.selector_fit import fit_selector, RIDGE
from dga_jax.checkpoint import abstract_decoder, load_model
from dga_jax.config import DGAConfig
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.files.path_flags import define_path
from dga_jax.model import Decoder, ModelConfig

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_FIT = flags.DEFINE_list("fit_documents", None, "Texts of the fit: .jsonl or .txt.", required=True)
_DOCUMENTS = flags.DEFINE_list("documents", None, "Texts of the test, others.", required=True)
_OUT = define_path("out", None, "JSON lines of the results.", required=True)
_FIT_ROWS = flags.DEFINE_integer("fit_rows", 2, "Rows of the fit, one of each text.", lower_bound=1)
_TEXTS = flags.DEFINE_integer("texts", 2, "Texts of the test.", lower_bound=1)
_ROWS = flags.DEFINE_integer("rows_per_document", 1, "Rows of each of them.", lower_bound=1)
_LENGTHS = flags.DEFINE_list("lengths", ["4096"], "Tokens of a row.")
_SETTINGS = flags.DEFINE_list(
  "settings",
  ["30+2:4", "30+2:38"],
  "Blocks of m merged and f focal tokens, and raw blocks w before a query's own, as m+f:w.",
)
_CHOICES = flags.DEFINE_list(
  "choices",
  ["last_query", "oracle", "fitted", "expected", "accumulated", "random"],
  "Choices to measure.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["bfloat16", "float32"], "Dtype to compute in; GPUs need bfloat16 for speed."
)
_STEPS = flags.DEFINE_integer("steps", 300, "Steps of the listwise fits.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choice.")


@dataclasses.dataclass(frozen=True)
class _FormKind:
  """How a form of the selector is fitted, and its features beside those of the head.

  Attributes:
    hidden: the layer's normalised input.
    place: the place in the block.
    listwise: the cross entropy of a block's attention is minimised; else ridge regression.
    mlp: with an MLP.
    value: the target is attention times the norm of the value; else attention.
  """

  hidden: bool = False
  place: bool = False
  listwise: bool = True
  mlp: bool = False
  value: bool = False


FORMS = {
  "ridge": _FormKind(listwise=False),
  "ridge_value": _FormKind(listwise=False, value=True),
  "ridge_hidden": _FormKind(hidden=True, listwise=False),
  "ridge_place": _FormKind(place=True, listwise=False),
  "listwise": _FormKind(),
  "listwise_hidden": _FormKind(hidden=True),
  "mlp": _FormKind(mlp=True),
  "mlp_hidden": _FormKind(hidden=True, mlp=True),
}


def main(argv: Sequence[str]) -> None:
  """Measures what is missing in OUT and prints the table."""
  del argv
  choices = [_parse(name) for name in _CHOICES.value]
  results = Results(Path(_OUT.value))
  base, _, tokenizer = load_model(_WORKDIR.value)
  base = _dense_in_dtype(base)
  print(environment())
  print("| tokens, blocks, w | choice | perplexity over dense | share of the gap |")
  print("| --- | --- | --- | --- |")
  with ThreadPoolExecutor() as pool:
    settings = []
    for length in map(int, _LENGTHS.value):
      rows = token_rows(
        read_documents(_DOCUMENTS.value)[: _TEXTS.value], tokenizer, length, _ROWS.value
      )
      fit_rows = token_rows(read_documents(_FIT.value)[: _FIT_ROWS.value], tokenizer, length)
      # Compiled once, if a setting of this length has something to measure.
      dense = functools.cache(functools.partial(pool.submit, _compile, dense_loss, base, rows))
      for blocks, window in (setting.split(":") for setting in _SETTINGS.value):
        name = f"{length} tokens {blocks} w={window} {_DTYPE.value}"
        config = _config(blocks, int(window))
        settings.append(_Setting(name, base, config, rows, fit_rows[:, :-1], dense, pool))
        if not settings[-1].is_measured(choices, results):
          settings[-1].start({form for form, _ in choices})
    for setting in settings:
      for form, merge in choices:
        setting.measure(form, merge, results)
      setting.print_table(choices, results)


def _parse(name: str) -> tuple[str, str]:
  """The choice and the merge weights of one of --choices."""
  choice, _, merge = name.partition("/")
  merge = merge or "query"
  if choice not in {*CHOICES, "fitted", *FORMS} - {"form"} or merge not in MERGES:
    raise app.UsageError(
      f"--choices has {name!r}; python -m benchmarks.selector --help lists them."
    )
  if choice == "last_query" and merge != "query":
    raise app.UsageError(f"--choices has {name!r}; last_query merges by the last query.")
  return choice, merge


def _config(blocks: str, window: int) -> DGAConfig:
  members, focal = map(int, blocks.split("+"))
  return DGAConfig(
    selection="streaming",
    group_size=members,
    focal_per_block=focal,
    sink_tokens=4,
    local_window=window,
    selector="fitted",
  )


class _Setting:
  """One length, block size and window: its fits and its program, made in the pool's threads.

  Args:
    name: of the results.
    base: the model with dense attention.
    config: of the blocks.
    rows: of the test.
    fit_rows: of the fit.
    dense: starts the compilation of `dense_loss`.
    pool: for compilation and fits.
  """

  def __init__(
    self,
    name: str,
    base: Decoder,
    config: DGAConfig,
    rows: Int[np.ndarray, "B T"],
    fit_rows: Int[np.ndarray, "F L"],
    dense: Callable[[], Future[Callable[..., Any]]],
    pool: ThreadPoolExecutor,
  ) -> None:
    self._name, self._base, self._config = name, base, config
    self._rows, self._fit_rows, self._dense, self._pool = rows, fit_rows, dense, pool
    self._params = nnx.split(base)[1]
    self._fits: dict[str, Future[Form]] = {}

  def is_measured(self, choices: Sequence[tuple[str, str]], results: Results) -> bool:
    """Whether the results have every choice."""
    names = ("dense", *("/".join(choice) for choice in choices))
    return all(self._key(name) in results for name in names)

  def start(self, names: set[str]) -> None:
    """Compiles the program, and fits the forms among `names`."""
    K, N = self._base.config.num_layers, self._base.config.num_kv_heads
    S, U = sizes(self._base)
    self._none = linear_form(jnp.zeros((K, N, S)), jnp.zeros((K, N, U)))
    run = functools.partial(second_half_loss, config=self._config, seed=_SEED.value)
    zero, self._compiled_dense = jnp.int32(0), self._dense()
    self._program = self._pool.submit(_compile, run, self._base, self._rows, self._none, zero, zero)
    if "fitted" in names:
      self._fits["fitted"] = self._pool.submit(self._fit_selector)
    if names & FORMS.keys():
      graphdef, params = nnx.split(self._base)
      inputs = self._pool.submit(collect, graphdef, params, self._config, self._fit_rows)
      for form in names & FORMS.keys():
        self._fits[form] = self._pool.submit(self._fit_form, FORMS[form], inputs)

  def measure(self, choice: str, merge: str, results: Results) -> None:
    """The losses of all rows, for one choice and one rule of merging."""
    self._run("dense", lambda row: self._compiled_dense.result()(self._params, row), results)
    is_form = choice not in CHOICES
    index = jnp.int32(CHOICES.index("form" if is_form else choice))

    def loss(row: Any) -> Any:
      form = self._fits[choice].result() if is_form else self._none
      by = jnp.int32(MERGES.index(merge))
      return self._program.result()(self._params, row, form, index, by)

    self._run(f"{choice}/{merge}", loss, results)

  def print_table(self, choices: Sequence[tuple[str, str]], results: Results) -> None:
    """A row of the table for each choice."""
    over = {
      choice: self._losses(f"{choice[0]}/{choice[1]}", results) - self._losses("dense", results)
      for choice in choices
    }
    last, best = (over.get((name, "query")) for name in ("last_query", "oracle"))
    for (choice, merge), loss in over.items():
      cells = [choice if merge == "query" else f"{choice}, merged by {merge}"]
      cells.append(f"{math.exp(loss.mean()):.4f}")
      if last is not None and best is not None:
        cells.append(f"{(last - loss).mean() / (last - best).mean():.2f}")
      print(f"| {self._name} | {' | '.join(cells)} |", flush=True)

  def _run(self, name: str, loss: Callable[[Any], Any], results: Results) -> None:
    if self._key(name) not in results:
      losses = [float(x) for x in [loss(jnp.asarray(row)) for row in self._rows]]
      results.add(self._key(name), {"losses": losses})

  def _losses(self, name: str, results: Results) -> np.ndarray:
    return np.asarray(results[self._key(name)]["losses"])

  def _key(self, name: str) -> str:
    length = self._rows.shape[1] - 1
    return f"dense {length} {_DTYPE.value}" if name == "dense" else f"{self._name} {name}"

  def _fit_selector(self) -> Form:
    weights = fit_selector(self._base, self._config, self._fit_rows)
    return self._none._replace(own=jnp.asarray(weights))

  def _fit_form(self, kind: _FormKind, inputs: Future[Any]) -> Form:
    hidden = self._base.config.embed_dim
    used = jnp.ones(sizes(self._base)[1]).at[:hidden].set(kind.hidden).at[hidden:].set(kind.place)
    collected = inputs.result()
    if kind.value:
      norm = collected.own[..., -1].astype(jnp.float32)
      collected = collected._replace(target=collected.target + jnp.log(norm))
    form = fit_ridge(collected, used, jnp.float32(RIDGE))
    if not kind.listwise:
      return form
    return fit_listwise(
      form,
      collected,
      used,
      mlp=kind.mlp,
      steps=_STEPS.value,
      learning_rate=3e-3 if kind.mlp else 1e-2,
      decay=1e-3 if kind.mlp else 1e-4,
    )


def _compile(function: Callable[..., Any], model: Decoder, rows: np.ndarray, *rest: Any) -> Any:
  """The function of the model's parameters, a row and the rest, compiled."""
  graphdef, params = nnx.split(model)
  row = jax.ShapeDtypeStruct(rows.shape[1:], jnp.int32)
  return jax.jit(functools.partial(function, graphdef)).lower(params, row, *rest).compile()


def _dense_in_dtype(model: Decoder) -> Decoder:
  changes = {"dtype": _DTYPE.value, "attention": "dense"}
  config = ModelConfig.from_dict(model.config.to_dict() | changes)
  changed: Decoder = nnx.merge(abstract_decoder(config)[0], nnx.state(model, nnx.Param))
  return changed


if __name__ == "__main__":
  app.run(main)

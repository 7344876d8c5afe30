r"""Perplexity of a pretrained model under each choice of focal tokens, at equal keys.

  python -m dga_jax.convert --source=SmolLM2-135M-Instruct.Q4_1.gguf --workdir=runs/smollm2
  python -m benchmarks.selector --workdir=runs/smollm2 --fit_documents=some.jsonl \
    --documents=others.jsonl --lengths=2048 --settings=30+2:4 --out=runs/selector.jsonl

The forms of the selector are fitted to --fit_documents. Then every choice selects the focal tokens
of the same blocks in rows of --documents, in all layers:

  last_query   the attention of the block's last query (`DGAConfig.selector`)
  accumulated  the attention of all queries of the block, each over the block's earlier tokens
  expected     expected attention, with the queries up to the block's end
  random       drawn
  fitted       the fitted selector, by the rule of `dga fit_selector`: cross entropy of a block's
               tokens, whose target is attention times the norm of the value
  oracle       the mean attention of later queries beyond the raw window, which decoding cannot know
  oracle_value, oracle_distance
               this attention times the norm of the value, or times the distance of the value from
               the mean of the block's values

Other forms of the selector:

  ridge            ridge regression of the logarithm of the attention
  ridge_value      the same for the attention times the norm of the value
  ridge_distance   the same for the attention times the distance of the value
  ridge_hidden     as ridge_value, with one more feature vector: the layer's normalised input
  ridge_place      as ridge_value, with more features: the place in the block
  fitted_hidden    as fitted, with the layer's normalised input
  mlp, mlp_hidden  as fitted and fitted_hidden, with a small MLP per head beside the linear form

CHOICE/scores, CHOICE/mean and CHOICE/oracle merge the members of a group by the softmax of the
choice's scores, by their mean, or by the oracle's attention, instead of the last query's attention.

A line is printed for each choice as soon as it is measured: the perplexity of the second half of
the rows over that of dense attention, and the share that the choice removes of the loss between
last_query and oracle, both with the standard error over the rows. The losses of all rows are
appended to OUT, and the same command continues an interrupted run.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from flax import nnx
from jax import Array
from jaxtyping import Int

from benchmarks._ratios import ratio_of_means
from benchmarks._results_model import require_model
from benchmarks._selector_forms import (
  collect,
  fit_listwise,
  fit_ridge,
  Form,
  Inputs,
  linear_form,
  sizes,
)
from benchmarks._selector_program import CHOICES, MERGES, second_half_loss
from benchmarks.timing import environment
from dga_jax.calibration.selector_fit import RIDGE
from dga_jax.calibration.selector_loss import LEARNING_RATE, STEPS
from dga_jax.checkpoint import abstract_decoder, load_model
from dga_jax.config import DGAConfig
from dga_jax.evaluation.results import Results
from dga_jax.evaluation.texts import read_documents, token_rows
from dga_jax.files.path_flags import define_path
from dga_jax.model import Decoder, ModelConfig

_WORKDIR = define_path("workdir", None, "Checkpoint of the model.", required=True)
_FIT = flags.DEFINE_list("fit_documents", None, "Texts of the fit: .jsonl or .txt.", required=True)
_DOCUMENTS = flags.DEFINE_list(
  "documents", None, "Texts of the test, other than those of the fit.", required=True
)
_OUT = define_path("out", None, "JSON lines of the results.", required=True)
_FIT_ROWS = flags.DEFINE_integer("fit_rows", 2, "Rows of the fit, one of each text.", lower_bound=1)
_TEXTS = flags.DEFINE_integer("texts", 2, "Texts of the test.", lower_bound=1)
_ROWS = flags.DEFINE_integer(
  "rows_per_document", 1, "Rows of each text of the test.", lower_bound=1
)
_LENGTHS = flags.DEFINE_list("lengths", ["4096"], "Tokens of a row.")
_SETTINGS = flags.DEFINE_list(
  "settings",
  ["30+2:4", "30+2:38"],
  "Blocks of m merged and f focal tokens, and raw blocks w before a query's own, as m+f:w.",
)
_CHOICES = flags.DEFINE_list(
  "choices",
  ["last_query", "oracle", "fitted", "expected", "accumulated", "random"],
  "Choices to measure; see above.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype", "float32", ["bfloat16", "float32"], "Dtype to compute in; GPUs need bfloat16 for speed."
)
_STEPS = flags.DEFINE_integer("steps", STEPS, "Steps of the fits by cross entropy.", lower_bound=1)
_SEED = flags.DEFINE_integer("seed", 0, "Seed of the random choice.")


@dataclasses.dataclass(frozen=True)
class _FormKind:
  """How a form of the selector is fitted, and its features beside those of the head.

  Attributes:
    hidden: the layer's normalised input.
    place: the place in the block.
    listwise: the cross entropy of a block's tokens is minimised; else ridge regression.
    mlp: with an MLP.
    value: the field of `Inputs` that is added to the target; None for the attention alone.
  """

  hidden: bool = False
  place: bool = False
  listwise: bool = False
  mlp: bool = False
  value: Literal["value_size", "value_distance"] | None = "value_size"


FORMS = {
  "fitted": _FormKind(listwise=True),
  "ridge": _FormKind(value=None),
  "ridge_value": _FormKind(),
  "ridge_distance": _FormKind(value="value_distance"),
  "ridge_hidden": _FormKind(hidden=True),
  "ridge_place": _FormKind(place=True),
  "fitted_hidden": _FormKind(listwise=True, hidden=True),
  "mlp": _FormKind(listwise=True, mlp=True),
  "mlp_hidden": _FormKind(listwise=True, hidden=True, mlp=True),
}
_GAP = (("last_query", "query"), ("oracle", "query"))  # Measured first, as a share needs both.
_RIDGE = np.float32(RIDGE)
_THREADS = 6  # Threads that compile programs, in the order in which the results need them.


def main(argv: Sequence[str]) -> None:
  """Measures what is missing in OUT and prints the table."""
  del argv
  choices = [_parse(name) for name in _CHOICES.value]
  out = Path(_OUT.value)
  results = Results(out)
  base, _, tokenizer = load_model(_WORKDIR.value)
  require_model(out.parent, base, f"{out.stem}.model")
  base = _dense_in_dtype(base)
  print(environment())
  print("| tokens, blocks, w | choice | perplexity over dense | share of the gap |")
  print("| --- | --- | --- | --- |")
  with ThreadPoolExecutor(_THREADS) as pool:
    settings = []
    for length in map(int, _LENGTHS.value):
      rows = token_rows(
        read_documents(_DOCUMENTS.value)[: _TEXTS.value], tokenizer, length, _ROWS.value
      )
      fit_rows = token_rows(read_documents(_FIT.value)[: _FIT_ROWS.value], tokenizer, length)
      for blocks, window in (setting.split(":") for setting in _SETTINGS.value):
        name = f"{length} tokens {blocks} w={window} {_DTYPE.value}"
        config = _config(blocks, int(window))
        settings.append(_Setting(name, base, config, rows, fit_rows[:, :-1], pool))
    missing = [setting for setting in settings if not setting.is_measured(choices, results)]
    order = [choice for choice in _GAP if choice in choices]
    order += [choice for choice in choices if choice not in order]
    for choice in order:
      for setting in missing:
        setting.start_programs(*choice, results)
    for choice in order[: sum(choice in choices for choice in _GAP)]:
      for setting in settings:
        setting.measure(*choice, results)
    for choice in choices:
      for setting in settings:
        setting.measure(*choice, results)
        setting.print_line(*choice, results)


def _parse(name: str) -> tuple[str, str]:
  """The choice and the merge weights of one of --choices."""
  choice, _, merge = name.partition("/")
  merge = merge or "query"
  if choice not in {*CHOICES, *FORMS} - {"dense", "form"} or merge not in MERGES:
    raise app.UsageError(
      f"--choices has {name!r}; python -m benchmarks.selector --help lists them."
    )
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
  """One length, block size and window: its fits, and its programs, compiled in the pool's threads.

  Args:
    name: of the results.
    base: the model with dense attention.
    config: of the blocks.
    rows: of the test.
    fit_rows: of the fit.
    pool: for compilation.
  """

  def __init__(
    self,
    name: str,
    base: Decoder,
    config: DGAConfig,
    rows: Int[np.ndarray, "B T"],
    fit_rows: Int[np.ndarray, "F L"],
    pool: ThreadPoolExecutor,
  ) -> None:
    self._name, self._base, self._config = name, base, config
    self._rows, self._fit_rows, self._pool = rows, jnp.asarray(fit_rows), pool
    self._graphdef, self._params = nnx.split(base)
    S, U = sizes(base)
    K, N = base.config.num_layers, base.config.num_kv_heads
    self._none = linear_form(jnp.zeros((K, N, S)), jnp.zeros((K, N, U)))
    self._programs: dict[Any, Future[Any]] = {}
    self._fits: dict[str, Form] = {}

  def is_measured(self, choices: Sequence[tuple[str, str]], results: Results) -> bool:
    """Whether the results have every choice."""
    names = ("dense", *("/".join(choice) for choice in choices))
    return all(self._key(name) in results for name in names)

  def start_programs(self, choice: str, merge: str, results: Results) -> None:
    """Starts the compilation of what the choice needs beyond earlier choices."""
    if self._key("dense") not in results:
      self._start(("dense", "query"), self._compile_loss, "dense", "query")
    if self._key(f"{choice}/{merge}") in results:
      return
    kind = "form" if choice in FORMS else choice
    self._start((kind, merge), self._compile_loss, kind, merge)
    if choice in FORMS:
      self._start(collect, self._compile_collect)
      self._start(fit_ridge, self._compile_ridge)
    if choice in FORMS and FORMS[choice].listwise:
      self._start(fit_listwise, self._compile_listwise)

  def measure(self, choice: str, merge: str, results: Results) -> None:
    """Measures the losses of all rows, unless the results have them."""
    self._run("dense", "dense", "query", results)
    self._run(f"{choice}/{merge}", choice, merge, results)

  def print_line(self, choice: str, merge: str, results: Results) -> None:
    """Prints the line of the table for a measured choice."""
    dense, loss = (self._losses(name, results) for name in ("dense", f"{choice}/{merge}"))
    name = choice if merge == "query" else f"{choice}, merged by {merge}"
    over = math.exp((loss - dense).mean())
    error = over * ratio_of_means(loss - dense, np.ones_like(dense))[1]
    cells = [self._name, name, f"{over:.4f} ± {error:.4f}"]
    if all(self._key("/".join(choice)) in results for choice in _GAP):
      last, best = (self._losses("/".join(choice), results) for choice in _GAP)
      cells.append("{:.2f} ± {:.2f}".format(*ratio_of_means(last - loss, last - best)))
    print(f"| {' | '.join(cells)} |", flush=True)

  def _run(self, name: str, choice: str, merge: str, results: Results) -> None:
    if self._key(name) in results:
      return
    form, kind = (self._fit(choice), "form") if choice in FORMS else (self._none, choice)
    program = self._programs[kind, merge].result()
    losses = [program(self._params, jnp.asarray(row), form) for row in self._rows]
    results.add(self._key(name), {"losses": [float(loss) for loss in losses]})

  def _losses(self, name: str, results: Results) -> np.ndarray:
    return np.asarray(results[self._key(name)]["losses"])

  def _key(self, name: str) -> str:
    length = self._rows.shape[1] - 1
    return f"dense {length} {_DTYPE.value}" if name == "dense" else f"{self._name} {name}"

  def _start(self, key: Any, compile_it: Callable[..., Any], *args: str) -> None:
    if key not in self._programs:
      self._programs[key] = self._pool.submit(compile_it, *args)

  def _compile_loss(self, choice: str, merge: str) -> Any:
    """`second_half_loss` of parameters, row and form."""
    run = functools.partial(
      second_half_loss,
      self._graphdef,
      choice=choice,
      merge=merge,
      config=self._config,
      seed=_SEED.value,
    )
    row = jax.ShapeDtypeStruct(self._rows.shape[1:], jnp.int32)
    return jax.jit(run).lower(self._params, row, self._none).compile()

  def _compile_collect(self) -> Any:
    return collect.lower(self._graphdef, self._params, self._config, self._fit_rows).compile()

  def _compile_ridge(self) -> Any:
    return fit_ridge.lower(self._input_shapes, self._used(FORMS["ridge"]), _RIDGE).compile()

  def _compile_listwise(self) -> Any:
    kind = FORMS["fitted"]
    options = {"steps": _STEPS.value, **_listwise_options(kind)}
    return fit_listwise.lower(self._none, self._input_shapes, self._used(kind), **options).compile()

  @functools.cached_property
  def _input_shapes(self) -> Inputs:
    shapes: Inputs = jax.eval_shape(
      functools.partial(collect, self._graphdef, config=self._config),
      params=self._params,
      tokens_BxL=self._fit_rows,
    )
    return shapes

  @functools.cached_property
  def _inputs(self) -> Inputs:
    inputs: Inputs = self._programs[collect].result()(self._params, self._fit_rows)
    return inputs

  def _fit(self, name: str) -> Form:
    if name in self._fits:
      return self._fits[name]
    kind, inputs = FORMS[name], self._inputs
    if kind.value is not None:
      inputs = inputs._replace(target=inputs.target + getattr(inputs, kind.value))
    used = self._used(kind)
    form: Form = self._programs[fit_ridge].result()(inputs, used, _RIDGE)
    if kind.listwise:
      form = self._programs[fit_listwise].result()(form, inputs, used, **_listwise_options(kind))
    self._fits[name] = form
    return form

  def _used(self, kind: _FormKind) -> Array:
    """1 for each shared feature that the form uses, else 0."""
    hidden = self._base.config.embed_dim
    used = jnp.ones(sizes(self._base)[1])
    return used.at[:hidden].set(kind.hidden).at[hidden:].set(kind.place)


def _listwise_options(kind: _FormKind) -> dict[str, Array]:
  rates = (
    {"learning_rate": 3e-3, "decay": 1e-3}
    if kind.mlp
    else {"learning_rate": LEARNING_RATE, "decay": 1e-4}
  )
  return {"mlp": jnp.asarray(kind.mlp)} | {name: jnp.float32(rate) for name, rate in rates.items()}


def _dense_in_dtype(model: Decoder) -> Decoder:
  changes = {"dtype": _DTYPE.value, "attention": "dense"}
  config = ModelConfig.from_dict(model.config.to_dict() | changes)
  changed: Decoder = nnx.merge(abstract_decoder(config)[0], nnx.state(model, nnx.Param))
  return changed


if __name__ == "__main__":
  app.run(main)

"""The training config: frozen dataclasses made from the ConfigDict of a configs/*.py file."""

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from dga_jax.model.config import dataclass_from_dict, ModelConfig
from dga_jax.sharding import MESH_AXES, MeshConfig
from train.data.config import DataConfig

_LARGEST_B2_IN_BFLOAT16 = 0.98


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter, 2019) with clipping and a cosine schedule.

  Attributes:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled, on matrices alone; norms' scales and other vectors do not decay.
    clip_norm: bound on the global norm of the gradient.
    final_rate: the learning rate at the last step, as a share of the peak.
    moment_dtype: in which both moments are stored; the update computes in float32. "bfloat16"
      takes half the memory. It keeps 8 bits, so a second moment that should move by less than
      0.4 % of itself in a step stays: b2 has to be well below 0.996.
  """

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  final_rate: float = 0.1
  moment_dtype: Literal["float32", "bfloat16"] = "float32"

  def __post_init__(self) -> None:
    for name in ("b1", "b2"):
      _require_number(self, name, "in [0, 1)", lambda x: 0 <= x < 1)
    for name in ("eps", "clip_norm"):
      _require_number(self, name, "above 0", lambda x: x > 0)
    _require_number(self, "weight_decay", "of at least 0", lambda x: x >= 0)
    _require_number(self, "final_rate", "in [0, 1]", lambda x: 0 <= x <= 1)
    if self.moment_dtype not in ("float32", "bfloat16"):
      raise ValueError(
        f"config.optimizer.moment_dtype is {self.moment_dtype!r}; it must be 'float32' or "
        "'bfloat16'."
      )
    if self.moment_dtype == "bfloat16" and self.b2 > _LARGEST_B2_IN_BFLOAT16:
      raise ValueError(
        f"config.optimizer.b2 is {self.b2}; with moment_dtype='bfloat16' it must be at most "
        f"{_LARGEST_B2_IN_BFLOAT16}, or the second moment would not move."
      )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What happens at a bad step: not finite, or with a spike of the loss; see train/bad_steps.py.

  Such a step changes nothing but the count of steps, and its batch is kept in the workdir.

  Attributes:
    policy: "stop" ends the run there; "skip" goes on with the next batch.
    spike_sigmas: a loss is a spike if it exceeds the mean of the last losses by more than so many
      of their standard deviations; None for no such rule.
    spike_window: how many losses those are; the rule holds once there are so many.
    max_skipped: skipped steps in a row at which the run ends after all.
  """

  policy: str = "stop"
  spike_sigmas: float | None = None
  spike_window: int = 128
  max_skipped: int = 16

  def __post_init__(self) -> None:
    if self.policy not in ("stop", "skip"):
      raise ValueError(f"config.guard.policy is {self.policy!r}; it must be 'stop' or 'skip'.")
    if self.spike_sigmas is not None:
      _require_number(self, "spike_sigmas", "above 0, or None", lambda x: x > 0)
    _require_int(self, "spike_window", least=2)
    _require_int(self, "max_skipped", least=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything that defines a training run.

  Attributes:
    model: the decoder.
    data: the corpus, the tokenizer and how batches are made of them.
    optimizer: AdamW.
    mesh: how the devices are arranged.
    guard: what happens at a step that diverges.
    init_from: workdir of the checkpoint whose model training begins with, an import's or another
      run's; None draws the parameters. Its tokenizer takes the place of data.tokenizer, and of
      `model` only attention with its settings, dtypes and remat hold.
    seed: of the initial parameters and of the data's order.
    num_steps: optimizer steps.
    batch_size: sequences of one optimizer step, over all processes.
    grad_accumulation: micro-batches that a step's batch is cut into, to save memory.
    learning_rate: the peak, reached after `warmup_steps`.
    warmup_steps: steps of the linear rise from 0.
    loss_chunk: tokens of a sequence whose logits exist at a time.
    log_every: steps between log lines.
    eval_every: steps between evaluations on the held-out data.
    eval_batches: batches of one evaluation; 0 evaluates nothing.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: newest checkpoints that are kept, besides the best.
  """

  model: ModelConfig
  data: DataConfig
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  init_from: str | None = None
  seed: int = 0
  num_steps: int = 1000
  batch_size: int = 8
  grad_accumulation: int = 1
  learning_rate: float = 1e-3
  warmup_steps: int = 100
  loss_chunk: int = 512
  log_every: int = 10
  eval_every: int = 100
  eval_batches: int = 8
  checkpoint_every: int = 100
  keep_checkpoints: int = 2

  def __post_init__(self) -> None:
    if not isinstance(self.init_from, str | None):
      raise ValueError(f"config.init_from is {self.init_from!r}; it must be a folder or None.")
    for name in ("seed", "warmup_steps", "eval_batches"):
      _require_int(self, name, least=0)
    for name in _POSITIVE:
      _require_int(self, name, least=1)
    _require_number(self, "learning_rate", "of at least 0", lambda x: x >= 0)
    if self.batch_size % self.grad_accumulation:
      raise ValueError(
        f"config.grad_accumulation is {self.grad_accumulation}; it must divide config.batch_size, "
        f"which is {self.batch_size}."
      )
    if self.warmup_steps >= self.num_steps:
      raise ValueError(
        f"config.warmup_steps is {self.warmup_steps}; it must be below config.num_steps, which is "
        f"{self.num_steps}."
      )


_POSITIVE = (
  "num_steps",
  "batch_size",
  "grad_accumulation",
  "loss_chunk",
  "log_every",
  "eval_every",
  "checkpoint_every",
  "keep_checkpoints",
)

# What may change when a run is taken up again: it does not change what is computed, or, as the
# rule for spikes, is there to be changed when one has come.
_FREE_ON_RESUME = frozenset(
  {
    "log_every",
    "eval_every",
    "eval_batches",
    "checkpoint_every",
    "keep_checkpoints",
    "data.cache_dir",
    "data.prefetch_batches",
    "data.stall_warning_seconds",
    "data.stall_error_seconds",
    "guard.policy",
    "guard.spike_sigmas",
    "guard.max_skipped",
    *(f"mesh.{axis}" for axis in MESH_AXES),
  }
)


def make_config(values: Mapping[str, Any]) -> TrainConfig:
  """The config dataclasses of nested values (a ConfigDict or what `to_dict` gave).

  Raises:
    ValueError: an unknown key (with the closest known one) or a value that makes no sense.
  """
  return _build(TrainConfig, values, "config")


def to_dict(config: TrainConfig) -> dict[str, Any]:
  """The config as nested dicts for JSON; `make_config` reads it back."""
  return dataclasses.asdict(config)


def to_flat_dict(config: TrainConfig) -> dict[str, Any]:
  """The config's values by dotted key, such as `config.model.dga.group_size`."""
  return _flatten(to_dict(config), "config.")


def known_keys(cls: type = TrainConfig, prefix: str = "") -> Iterator[str]:
  """Every dotted key that a config may set, such as `model.dga.group_size`."""
  for name, nested in _fields(cls).items():
    yield prefix + name
    if nested is not None:
      yield from known_keys(nested, f"{prefix}{name}.")


def check_key(key: str) -> None:
  """Raises ValueError with the closest known key if `key`, dotted, is no config key."""
  keys = list(known_keys())
  if key in keys:
    return
  # A right name at the wrong level is the commonest slip, then a misspelt one.
  name = key.rpartition(".")[2]
  same_name = [known for known in keys if known.rpartition(".")[2] == name]
  close = same_name or difflib.get_close_matches(key, keys, n=1, cutoff=0.0)
  raise ValueError(f"There is no config key 'config.{key}'. Did you mean 'config.{close[0]}'?")


def check_resumable(now: TrainConfig, saved: Mapping[str, Any]) -> None:
  """Raises ValueError if a run would not go on as the one that was saved.

  Args:
    now: the config given.
    saved: `to_dict` of the config in the checkpoint.
  """
  ours, theirs = _flatten(to_dict(now)), _flatten(saved)
  for key in sorted(ours.keys() | theirs.keys()):
    if key in _FREE_ON_RESUME or ours.get(key) == theirs.get(key):
      continue
    raise ValueError(
      f"config.{key} is {ours.get(key)!r}, but the run in this workdir was started with "
      f"{theirs.get(key)!r}. Give it the old value, or another --workdir to start a new run."
    )


def _build(cls: type, values: Any, path: str) -> Any:
  """Makes the dataclass `cls`, whose fields may be dataclasses, of a mapping."""
  fields = _fields(cls)
  arguments = {}
  for name in values:
    if name not in fields:
      check_key(f"{path}.{name}".removeprefix("config."))
    value, nested = values[name], fields[name]
    if nested is not None and value is not None:
      value = _build(nested, value, f"{path}.{name}")
    arguments[name] = tuple(value) if isinstance(value, list) else value
  return dataclass_from_dict(cls, arguments, path=path)


def _fields(cls: type) -> dict[str, type | None]:
  """A dataclass's fields, each with the dataclass that it holds, if it holds one."""
  hints = typing.get_type_hints(cls)
  return {field.name: _nested(hints[field.name]) for field in dataclasses.fields(cls)}


def _nested(hint: Any) -> type | None:
  options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
  for option in options:
    if isinstance(option, type) and dataclasses.is_dataclass(option):
      return option
  return None


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
  flat: dict[str, Any] = {}
  for name, value in values.items():
    if isinstance(value, Mapping):
      flat |= _flatten(value, f"{prefix}{name}.")
    else:
      flat[prefix + name] = list(value) if isinstance(value, tuple) else value
  return flat


def _require_int(config: object, name: str, *, least: int) -> None:
  value = getattr(config, name)
  if not isinstance(value, int) or isinstance(value, bool) or value < least:
    raise ValueError(f"config.{name} is {value!r}; it must be an integer of at least {least}.")


def _require_number(config: object, name: str, wants: str, holds: Callable[[float], bool]) -> None:
  value = getattr(config, name)
  is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
  if not (is_number and math.isfinite(value) and holds(value)):
    raise ValueError(f"config.{name} is {value!r}; it must be a finite number {wants}.")

"""The training config: frozen dataclasses made from the ConfigDict of a configs/*.py file."""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from dga_jax.config_dataclasses import (
  check_keys,
  config_error,
  flatten,
  from_dict,
  LARGEST_SEED,
  require_choice,
  require_int,
  require_number,
)
from dga_jax.files.paths import check_path
from dga_jax.model.config import ModelConfig
from dga_jax.sharding import MESH_AXES, MeshConfig
from train.data.config import DataConfig

MomentDtype = Literal["float32", "bfloat16"]
BadStepPolicy = Literal["stop", "skip"]

_LARGEST_B2_IN_BFLOAT16 = 0.98


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
  """AdamW (Loshchilov and Hutter, 2019) with clipping and a cosine schedule.

  Attributes:
    b1: decay of the first moment.
    b2: decay of the second moment.
    eps: added to the root of the second moment.
    weight_decay: decoupled weight decay of matrices; the scales of norms and other vectors do not
      decay.
    clip_norm: bound on the global norm of the gradient.
    final_rate: the learning rate at the last step, as a share of the peak.
    moment_dtype: dtype in which both moments are stored; the update computes in float32.
      "bfloat16" halves their memory. It has 8 significant bits, so a second moment whose relative
      change per step is below 0.4 % does not change at all: b2 must be well below 0.996.
  """

  b1: float = 0.9
  b2: float = 0.95
  eps: float = 1e-8
  weight_decay: float = 0.1
  clip_norm: float = 1.0
  final_rate: float = 0.1
  moment_dtype: MomentDtype = "float32"

  def __post_init__(self) -> None:
    require_number(self, "b1", "b2", least=0, below=1)
    require_number(self, "eps", "clip_norm", above=0)
    require_number(self, "weight_decay", least=0)
    require_number(self, "final_rate", least=0, most=1)
    require_choice(self, "moment_dtype", MomentDtype)
    if self.moment_dtype == "bfloat16" and self.b2 > _LARGEST_B2_IN_BFLOAT16:
      raise config_error(
        self,
        "b2",
        f"at most {_LARGEST_B2_IN_BFLOAT16} with moment_dtype='bfloat16', in which a slower second"
        " moment rounds to its old value",
      )


@dataclasses.dataclass(frozen=True)
class GuardConfig:
  """What the trainer does at a bad step: a loss or gradient that is not finite, or a loss spike.

  A bad step changes only the step counter. Its batch is saved in the workdir. The check is in
  train/bad_steps.py.

  Attributes:
    policy: "stop" ends the run; "skip" continues with the next batch.
    spike_sigmas: a loss is a spike if it exceeds the mean of the last `spike_window` losses by
      more than this many of their standard deviations; None for no spike check.
    spike_window: losses in that mean. The spike check starts after this many steps.
    max_skipped: consecutive skipped steps that end the run.
  """

  policy: BadStepPolicy = "stop"
  spike_sigmas: float | None = None
  spike_window: int = 128
  max_skipped: int = 16

  def __post_init__(self) -> None:
    require_choice(self, "policy", BadStepPolicy)
    require_number(self, "spike_sigmas", above=0, optional=True)
    require_int(self, "spike_window", least=2)
    require_int(self, "max_skipped", least=1)


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """Everything that defines a training run.

  Attributes:
    model: the decoder.
    data: the corpus, the tokenizer and how batches are made of them.
    optimizer: AdamW.
    mesh: sizes of the device mesh's axes.
    guard: what the trainer does at a bad step.
    init_from: workdir with a checkpoint of an imported model or of another run; training starts
      from its parameters and uses its tokenizer instead of data.tokenizer. The checkpoint's model
      config replaces `model`, except for the attention kind and its settings, the dtypes, remat,
      head_gates and unroll_layers; the log names every value of `model` that it replaces. None
      draws random parameters.
    rope_base: RoPE base in place of the one of the model in `init_from`, for sequences that are
      longer than those of its training; None for the model's own.
    budgets: JSON file of head budgets, such as `dga calibrate` writes for the model in `init_from`.
      The run then has attention="head_budgets" in place of model.attention, and its KV heads are in
      an order in which every device of the mesh axis "tensor" has its share of every setting
      (train/head_order.py). So are those of model.head_budgets with init_from. Every start of the
      run reads the file. None for model.attention.
    distillation: w in [0, 1] of the loss (1 − w)·cross entropy + w·KL(dense‖model), where `dense`
      is the prediction of the same weights with dense attention, which has no gradient
      (train/distillation.py). Above 0 a step also takes a forward pass of dense attention.
    full_heads: with model.head_gates the mean of the gates, which is the share of KV heads that
      will be full. All other weights stay fixed (train/gates.py).
    seed: of the initial parameters and of the order of the data.
    num_steps: optimizer steps.
    batch_size: sequences of one optimizer step, over all processes.
    grad_accumulation: micro-batches into which a step's batch is split, to save memory.
    learning_rate: the peak, reached after `warmup_steps`.
    warmup_steps: steps of the linear warm-up from 0.
    loss_chunk: tokens of a sequence whose logits are computed at a time.
    log_every: steps between log lines.
    eval_every: steps between evaluations on the held-out data.
    eval_batches: batches of one evaluation; 0 turns evaluation off.
    checkpoint_every: steps between checkpoints.
    keep_checkpoints: how many of the newest checkpoints to keep, besides the best one.
  """

  model: ModelConfig
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
  mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
  guard: GuardConfig = dataclasses.field(default_factory=GuardConfig)
  init_from: str | None = None
  rope_base: float | None = None
  budgets: str | None = None
  distillation: float = 0.0
  full_heads: float = 0.125
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
      raise config_error(self, "init_from", "a folder or None")
    if self.init_from is not None:
      check_path("TrainConfig.init_from", self.init_from, allow_gcs=True)
    require_number(self, "rope_base", above=0, optional=True)
    if self.rope_base is not None and self.init_from is None:
      raise config_error(self, "rope_base", "None without init_from; set model.rope_base")
    if not isinstance(self.budgets, str | None):
      raise config_error(self, "budgets", "a JSON file or None")
    if self.budgets is not None:
      check_path("TrainConfig.budgets", self.budgets)
    require_int(self, "seed", least=0, most=LARGEST_SEED)
    require_int(self, "warmup_steps", "eval_batches", least=0)
    require_int(
      self,
      "num_steps",
      "batch_size",
      "grad_accumulation",
      "loss_chunk",
      "log_every",
      "eval_every",
      "checkpoint_every",
      "keep_checkpoints",
      least=1,
    )
    require_number(self, "learning_rate", least=0)
    require_number(self, "distillation", least=0, most=1)
    require_number(self, "full_heads", above=0, below=1)
    if self.model.head_gates and self.budgets is not None:
      raise config_error(self, "budgets", "None with model.head_gates, of which budgets are made")
    if self.batch_size % self.grad_accumulation:
      raise config_error(self, "grad_accumulation", f"a divisor of batch_size={self.batch_size}")
    if self.warmup_steps >= self.num_steps:
      raise config_error(self, "warmup_steps", f"below num_steps={self.num_steps}")


# Keys that may differ when a run resumes. They do not change what is computed, or, like the mesh,
# the order of sums alone, or, like the spike check, they exist to be changed after a spike.
_FREE_ON_RESUME = frozenset(
  {
    "budgets",  # model.head_budgets has the content of the file.
    "data.train_files",  # The fingerprint of the data has the content and order of the files.
    "data.validation_files",
    "grad_accumulation",
    "loss_chunk",
    "model.remat",
    "model.unroll_layers",
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


def make_config(values: Any) -> TrainConfig:
  """The config dataclasses of nested values (a ConfigDict, or what `to_dict` returned).

  With `init_from` the checkpoint decides whether the model has a fitted selector. Until it is read,
  `model.focal_selector` is True, so that the attention settings may have selector="fitted".

  Raises:
    ValueError: an unknown key (with the closest known one), a missing key or a wrong value.
  """
  check_keys(TrainConfig, values, "config")
  if values.get("init_from") is not None and hasattr(values.get("model"), "keys"):
    values = {**values, "model": {**values["model"], "focal_selector": True}}
  return from_dict(TrainConfig, values, path="config")


def to_dict(config: TrainConfig) -> dict[str, Any]:
  """The config as nested dicts for JSON; `make_config` reads it back."""
  return dataclasses.asdict(config)


def to_flat_dict(config: TrainConfig) -> dict[str, Any]:
  """The config's values by dotted key, such as `config.model.dga.group_size`."""
  return flatten(to_dict(config), "config.")


def check_resumable(now: TrainConfig, saved: Mapping[str, Any]) -> None:
  """Raises ValueError if a run would compute something else than the run that was saved.

  Args:
    now: the config of this run.
    saved: `to_dict` of the config in the checkpoint. Keys that it lacks, because they are newer
      than the checkpoint, have their defaults.
  """
  stored = from_dict(TrainConfig, saved, path="the checkpoint's config")
  if (now.budgets is None) != (stored.budgets is None):  # Else model.attention would be named.
    raise _other_value("budgets", now.budgets, stored.budgets)
  ours, theirs = flatten(to_dict(now)), flatten(to_dict(stored))
  # An optional dataclass that is None on one side has keys on the other side alone.
  for key in sorted(ours.keys() | theirs.keys()):
    if key in _FREE_ON_RESUME or ours.get(key) == theirs.get(key):
      continue
    if key.startswith("model.head_budgets") and now.budgets is not None:
      raise ValueError(
        f"config.budgets is {now.budgets!r}, whose budgets differ from those that the run in this "
        "workdir was started with. Restore the file, or give another --workdir to start a new run."
      )
    raise _other_value(key, ours.get(key), theirs.get(key))


def _other_value(key: str, now: Any, stored: Any) -> ValueError:
  return ValueError(
    f"config.{key} is {now!r}, but the run in this workdir was started with {stored!r}. Give it "
    "the old value, or another --workdir to start a new run."
  )

r"""Serves a model over HTTP with OpenAI's interface, and a page to chat with it.

  dga serve --workdir=runs/llama --port=8000 --slots=16 --max_length=32768
  curl http://127.0.0.1:8000/v1/completions \
    -H "Content-Type: application/json" \
    -d '{"model": "llama", "prompt": "The capital of France is"}'

The page is at http://127.0.0.1:8000. Without --workdir the command serves
SmolLM2-135M-Instruct (Q4_1), which the first run downloads (93 MB). Serving
needs the extra "serve".
"""

import functools
import os
from pathlib import Path
from typing import cast, get_args, TYPE_CHECKING

from absl import flags
from tqdm import tqdm

from dga_jax import command_line
from dga_jax.choices import AttentionName, CacheDtypeName, DtypeName, WeightName
from dga_jax.files.path_flags import define_path, define_paths
from dga_jax.flag_help import FlagGroups

if TYPE_CHECKING:
  from dga_jax.head_budgets import HeadBudgets

_GROUPS = FlagGroups()

_GROUPS.start("Model")
_WORKDIR = define_path(
  "workdir", None, "Folder with the checkpoint; default: SmolLM2-135M-Instruct (Q4_1), downloaded."
)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_NAME = flags.DEFINE_string("name", None, "Name of the model; default: the workdir's name.")
_ATTENTION = flags.DEFINE_list(
  "attention",
  None,
  "Attention kinds, for example dga,dense, each served as a model of its own; default: the"
  " checkpoint's kind, and dga for SmolLM2.",
)
_BUDGETS = define_paths(
  "budgets",
  "JSON files with the setting of each KV head, made for this checkpoint (dga calibrate). Several "
  "are models of their own, NAME-25 for budgets_25.json; default: the checkpoint's attention.",
)
_DTYPE = flags.DEFINE_enum(
  "dtype",
  None,
  get_args(DtypeName),
  "Dtype of the activations; default: the checkpoint's.",
)
_WEIGHTS = command_line.define_weights()
_CACHE_DTYPE = command_line.define_cache_dtype()
_MESH = flags.DEFINE_string(
  "mesh", None, "tensor=N splits the model over N devices of this host; default: one device."
)

_GROUPS.start("Requests and memory")
_SLOTS = flags.DEFINE_integer("slots", 8, "Requests of each model that run at once.", lower_bound=1)
_MAX_LENGTH = flags.DEFINE_integer(
  "max_length",
  None,
  "Bound on the tokens of a prompt and its answer; default: the context that the model was trained"
  " on, or 4096.",
  lower_bound=2,
)
_PROMPT_CHUNK = flags.DEFINE_integer(
  "prompt_chunk",
  256,
  "Tokens of a prompt that are read between two decode chunks. A running request waits for at most"
  " one such piece.",
  lower_bound=1,
)
_DECODE_CHUNK = flags.DEFINE_integer(
  "decode_chunk",
  4,
  "Tokens of each request that are decoded in one program and sent together.",
  lower_bound=1,
)
_CACHE_GB = flags.DEFINE_float(
  "cache_gb",
  None,
  "Memory of all caches of each model on the device, in GB; kept conversations get what the slots"
  " leave. Default: as many kept conversations as slots.",
  lower_bound=0.0,
)
_HOST_CACHE_GB = flags.DEFINE_float(
  "host_cache_gb",
  4.0,
  "Memory of each model's kept conversations on the host, in GB.",
  lower_bound=0.0,
)

_GROUPS.start("Network")
_HOST = flags.DEFINE_string("host", "127.0.0.1", "Address to listen on; 0.0.0.0 for every network.")
_PORT = flags.DEFINE_integer("port", 8000, "Port to listen on.", lower_bound=0, upper_bound=65535)
_API_KEY = flags.DEFINE_string(
  "api_key", None, "Key that clients must send; default: $DGA_API_KEY, or no key."
)
_MAX_WAITING = flags.DEFINE_integer(
  "max_waiting",
  256,
  "Requests that may wait for a slot; further ones get status 429.",
  lower_bound=0,
)
_MAX_BODY_MB = flags.DEFINE_float(
  "max_body_mb", 16.0, "Largest body of a request, in MB.", lower_bound=0.001, upper_bound=1e6
)
_STOP_SECONDS = flags.DEFINE_integer(
  "stop_seconds", 30, "Seconds that running requests get after SIGTERM.", lower_bound=0
)


def main() -> None:
  """Loads the model, compiles, and serves until SIGTERM or Ctrl-C."""
  from dga_jax.serving import launch, server
  from dga_jax.serving.app import AppSettings, make_app
  from dga_jax.serving.http_guards import read_api_key

  api_key = read_api_key(_API_KEY.value, os.environ)
  server.check_address(_HOST.value, _PORT.value)
  settings = launch.LaunchSettings(
    slots=_SLOTS.value,
    max_length=_MAX_LENGTH.value,
    max_waiting=_MAX_WAITING.value,
    prompt_chunk=_PROMPT_CHUNK.value,
    decode_chunk=_DECODE_CHUNK.value,
    cache_bytes=None if _CACHE_GB.value is None else int(_CACHE_GB.value * 1e9),
    host_bytes=int(_HOST_CACHE_GB.value * 1e9),
    mesh=launch.parse_mesh(_MESH.value),
  )
  workdir, name, attentions = _source()
  models = launch.load_models(
    workdir,
    _STEP.value,
    name=name,
    attentions=attentions,
    dtype=cast(DtypeName | None, _DTYPE.value),
    budgets=_read_budgets(),
    weights=cast(WeightName | None, _WEIGHTS.value),
    cache_dtype=cast(CacheDtypeName | None, _CACHE_DTYPE.value),
    settings=settings,
    progress=functools.partial(tqdm, desc="compiling", unit="program"),
  )
  for model in models:
    print(launch.describe(model, settings), flush=True)
  app = make_app(
    models,
    AppSettings(api_key=api_key, max_body_bytes=int(_MAX_BODY_MB.value * 1e6)),
  )

  def end_requests() -> None:
    for model in models:
      model.engine.close()

  server.run(
    app,
    host=_HOST.value,
    port=_PORT.value,
    stop_seconds=_STOP_SECONDS.value,
    end_requests=end_requests,
  )


def _read_budgets() -> "dict[str, HeadBudgets]":
  """The budgets of --budgets by the name of their file, without "budgets" at its beginning."""
  from dga_jax.head_budgets import read_head_budgets

  found: dict[str, HeadBudgets] = {}
  for path in _BUDGETS.value or ():
    name = Path(path).stem.removeprefix("budgets").lstrip("-_") or "budgets"
    if name in found:
      raise ValueError(f"--budgets has two files for a model {name!r}; rename one of them.")
    found[name] = read_head_budgets(path)
  return found


def _source() -> tuple[str, str | None, list[AttentionName | None]]:
  """The workdir, the name of the model, and the attention kinds."""
  attentions = cast(list[AttentionName | None], _ATTENTION.value or [None])
  if _WORKDIR.value is not None:
    return str(_WORKDIR.value), _NAME.value, attentions
  from dga_jax import smollm2_demo

  workdir = smollm2_demo.prepare(smollm2_demo.cache_folder())
  return (
    str(workdir),
    _NAME.value or "smollm2-135m",
    (attentions if _ATTENTION.value or _BUDGETS.value else ["dga"]),
  )


if __name__ == "__main__":
  command_line.run(main, _GROUPS)

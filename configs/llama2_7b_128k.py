"""LLaMA2-7B at 128K with Dynamic Group Attention, sequences split over eight chips.

  python -m train.compile_topology --config=configs/llama2_7b_128k.py --topology=v5p:8x8x8
  python -m train.main --config=configs/llama2_7b_128k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_128k

For 512 chips of a TPU v5p. It was compiled for them (README) and not run.
"""

from ml_collections import ConfigDict

from configs import llama2_7b_32k


def get_config() -> ConfigDict:
  """As at 32K, with a context axis."""
  config = llama2_7b_32k.get_config()
  config.batch_size = 32

  config.mesh.fsdp = 32
  config.mesh.tensor = -1
  config.mesh.context = 8

  config.data.sequence_length = 131072
  return config

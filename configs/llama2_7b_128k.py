r"""LLaMA2-7B at 128K with Dynamic Group Attention, each sequence split over eight chips.

  python -m train.compile_topology --config=configs/llama2_7b_128k.py --topology=v5p:8x8x8
  python -m train.main --config=configs/llama2_7b_128k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_128k

The config is for 512 TPU v5p chips. The step was compiled for them (docs/benchmarks.md) but not
run.
"""

from ml_collections import ConfigDict

from configs import llama2_7b_32k


def get_config() -> ConfigDict:
  """The config at 32K, with a context axis of the mesh."""
  config = llama2_7b_32k.get_config()
  config.update(
    {
      "batch_size": 32,
      "mesh": {"fsdp": 32, "tensor": -1, "context": 8},
      "data": {"sequence_length": 131072},
    }
  )
  return config

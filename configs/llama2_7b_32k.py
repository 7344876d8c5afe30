r"""LLaMA2-7B at 32K with Dynamic Group Attention, starting from the pretrained model.

  python -m train.compile_topology --config=configs/llama2_7b_32k.py --topology=v5p:8x8x8
  python -m train.main --config=configs/llama2_7b_32k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_32k

The config needs at least 128 chips of 16 GB. Rows are split over 128 chips. With more chips, heads
are split over the remaining factor. The step was compiled for TPU pods (docs/benchmarks.md) but
not run.
"""

from ml_collections import ConfigDict

from configs import llama2_7b_8k


def get_config() -> ConfigDict:
  """Streaming selection with sinks and a window, because the model was pretrained dense."""
  config = llama2_7b_8k.get_config()
  config.update(
    {
      "batch_size": 128,
      "model": {
        "dga": {"selection": "streaming", "sink_tokens": 4, "local_window": 16},
      },
      "mesh": {"fsdp": 128, "tensor": -1},
      "data": {"sequence_length": 32768},
    }
  )
  return config

"""LLaMA2-7B at 32K with Dynamic Group Attention, continued from the pretrained model.

  python -m train.compile_topology --config=configs/llama2_7b_32k.py --topology=v5p:8x8x8
  python -m train.main --config=configs/llama2_7b_32k.py --config.init_from=runs/llama2 \
    --config.data.train_files="('texts/**/*.txt',)" --workdir=runs/llama2_32k

For at least 128 chips of 16 GB: rows over 128 of them, heads over what is left. It was compiled
for TPU pods (README) and not run.
"""

from ml_collections import ConfigDict

from configs import llama2_7b_8k


def get_config() -> ConfigDict:
  """Streaming selection, with sinks and a raw window for a model that was pretrained dense."""
  config = llama2_7b_8k.get_config()
  config.batch_size = 128

  config.model.dga.selection = "streaming"
  config.model.dga.sink_tokens = 4
  config.model.dga.local_window = 16
  config.model.dga.max_documents = 16

  config.mesh.fsdp = 128
  config.mesh.tensor = -1

  config.data.sequence_length = 32768
  return config

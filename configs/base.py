"""Every config key with its default; an experiment starts from these and changes some.

A key that stands here can be changed on the command line, as in --config.model.dga.group_size=32.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
  """The defaults: a small decoder with DGA on text. Placeholders are None until they are set."""
  config = ConfigDict()
  config.init_from = placeholder(str)  # Workdir of a model to begin with.
  config.seed = 0
  config.num_steps = 1000
  config.batch_size = 8  # Sequences of a step, over all processes.
  config.grad_accumulation = 1  # Micro-batches that a step's batch is cut into.
  config.learning_rate = 1e-3  # The peak.
  config.warmup_steps = 100
  config.loss_chunk = 512  # Tokens of a sequence whose logits exist at a time.
  config.log_every = 10
  config.eval_every = 100
  config.eval_batches = 8
  config.checkpoint_every = 100
  config.keep_checkpoints = 2

  config.model = ConfigDict()
  config.model.vocab_size = 4096
  config.model.num_layers = 4
  config.model.embed_dim = 256
  config.model.num_heads = 8
  config.model.num_kv_heads = 2
  config.model.head_dim = 32
  config.model.mlp_dim = 768
  config.model.rope_base = 10000.0
  config.model.rope_scaling = placeholder(dict)
  config.model.norm_eps = 1e-5
  config.model.tie_embeddings = False
  config.model.qkv_bias = False
  config.model.qk_norm = False
  config.model.attention = "dga"
  config.model.dtype = "bfloat16"
  config.model.param_dtype = "float32"
  config.model.remat = "none"

  config.model.dga = ConfigDict()
  config.model.dga.group_size = 16
  config.model.dga.importance_rate = 0.1
  config.model.dga.min_focal_tokens = 1024
  config.model.dga.selection = "global"
  config.model.dga.visibility = "inclusive"
  config.model.dga.aggregation_scale = "head_dim"
  config.model.dga.complementary = True
  config.model.dga.group_logit_bias = "none"
  config.model.dga.n_recent = 32
  config.model.dga.n_random = 32
  config.model.dga.seed = 0
  config.model.dga.sink_tokens = 0
  config.model.dga.local_window = 0
  config.model.dga.focal_per_block = placeholder(int)
  config.model.dga.cache_dtype = placeholder(str)
  config.model.dga.max_documents = placeholder(int)

  config.model.sliding_window = ConfigDict({"window": 4096})
  config.model.streaming_llm = ConfigDict({"sinks": 4, "window": 2000})
  config.model.lm_infinite = ConfigDict({"global_tokens": 10, "local_window": 4096})
  config.model.minference = ConfigDict()
  config.model.minference.vertical = 1000
  config.model.minference.slash = 6096
  config.model.minference.last_queries = 64
  config.model.minference.first_tokens = 30
  config.model.minference.recent_distances = 100
  config.model.top_k_eviction = ConfigDict({"heavy": 410, "recent": 410, "interval": 64})
  config.model.top_k_eviction.dense_prompt = False
  config.model.kv_merger = ConfigDict({"budget": 2048, "heavy": 245, "recent": 512})
  config.model.kv_merger.interval = 64
  config.model.kv_merger.dense_prompt = False

  config.data = ConfigDict()
  config.data.kind = "text"
  config.data.sequence_length = 2048
  config.data.train_files = ("python-stdlib",)
  config.data.validation_files = ()
  config.data.tokenizer = "bpe"
  config.data.vocab_size = 4096
  config.data.max_documents = placeholder(int)
  config.data.prefetch_batches = 4
  config.data.stall_warning_seconds = 30.0
  config.data.stall_error_seconds = 1800.0
  config.data.cache_dir = placeholder(str)

  config.data.recall = ConfigDict()
  config.data.recall.num_pairs = 32
  config.data.recall.first_pairs = 4
  config.data.recall.first_length = 32
  config.data.recall.curriculum_rows = 0
  config.data.recall.num_keys = 64
  config.data.recall.num_values = 64
  config.data.recall.num_noise = 64
  config.data.recall.validation_rows = 256

  config.mesh = ConfigDict()  # Pieces; -1 is what the other axes leave of the devices.
  config.mesh.data = -1  # Of the batch.
  config.mesh.fsdp = 1  # Of the batch and of the stored parameters.
  config.mesh.tensor = 1  # Of heads, MLP and vocabulary.
  config.mesh.context = 1  # Of the sequence.

  config.guard = ConfigDict()  # Steps whose loss or gradient is not finite, or a spike.
  config.guard.policy = "stop"  # Or "skip".
  config.guard.spike_sigmas = placeholder(float)
  config.guard.spike_window = 128
  config.guard.max_skipped = 16

  config.optimizer = ConfigDict()
  config.optimizer.b1 = 0.9
  config.optimizer.b2 = 0.95
  config.optimizer.eps = 1e-8
  config.optimizer.weight_decay = 0.1
  config.optimizer.clip_norm = 1.0
  config.optimizer.final_rate = 0.1
  config.optimizer.moment_dtype = "float32"
  return config

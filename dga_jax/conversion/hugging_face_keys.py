"""Every key of a config.json of the LLaMA family, and of the RoPE objects in it.

The tables follow the config classes of transformers 4 and 5 for llama, mistral, qwen2 and qwen3,
and the further keys that published checkpoints of these families have.
"""

from dga_jax.conversion.known_keys import KnownKeys

# Dropout acts in training alone, and pretraining_tp only splits matrix products.
_BOOKKEEPING = frozenset(
  """
  _attn_implementation _attn_implementation_autoset _attn_implementation_internal _commit_hash
  _flash_attn_2_enabled _name_or_path attention_dropout attn_implementation auto_map
  chunk_size_feed_forward embd_pdrop finetuning_task gradient_checkpointing hidden_dropout id2label
  initializer_range is_decoder is_llama_config label2id max_sequence_length name_or_path
  neftune_noise_alpha num_labels output_attentions output_hidden_states prefix pretraining_tp
  problem_type pruned_heads resid_pdrop return_dict task_specific_params tf_legacy_loss
  tie_last_hidden_states tokenizer_class torchscript transformers.js_config transformers_version
  unsloth_fixed unsloth_version use_bfloat16 use_cache use_flash_attn use_flash_attention
  use_return_dict
  """.split()
)
# Old files keep settings of generation in config.json; they change no logits.
_GENERATION = frozenset(
  """
  bad_words_ids begin_suppress_tokens decoder_start_token_id diversity_penalty do_sample
  early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
  forced_eos_token_id length_penalty max_length max_new_tokens min_length min_p
  no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores
  remove_invalid_values repetition_penalty return_dict_in_generate sep_token_id suppress_tokens
  temperature top_k top_p typical_p
  """.split()
)
# Ids of tokens: a checkpoint keeps them beside its config.
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
# The dtype of a checkpoint is that of its tensors.
DTYPES = frozenset({"dtype", "torch_dtype"})

_ROPE_SOURCES = frozenset(
  "max_position_embeddings original_max_position_embeddings rope_parameters rope_scaling "
  "rope_theta".split()
)
_COMPUTED = frozenset(
  """
  architectures head_dim hidden_size intermediate_size layer_types max_window_layers model_type
  num_attention_heads num_hidden_layers num_key_value_heads rms_norm_eps sliding_window
  tie_word_embeddings use_sliding_window vocab_size
  """.split()
)

CONFIG = KnownKeys(
  read=_COMPUTED | _ROPE_SOURCES,
  unused=_BOOKKEEPING | _GENERATION | DTYPES | frozenset(TOKEN_IDS),
  fixed={
    "add_cross_attention": (False,),
    "alibi": (False,),
    "attention_bias": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "attn_temperature_tuning": (False,),
    "clip_qkv": (),
    "compression_config": (),
    "cross_attention_hidden_size": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "hidden_act": ("silu", "swish"),
    "is_causal": (True,),
    "is_encoder_decoder": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "mlp_bias": (False,),
    "no_rope_layers": (),
    "num_experts": (),
    "num_experts_per_tok": (),
    "num_local_experts": (),
    "partial_rotary_factor": (1,),
    "per_layer_config": (),
    "qk_layernorm": (False,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "tie_encoder_decoder": (False,),
    "use_mrope": (False,),
    "use_qk_norm": (False,),
  },
)

# RoPE objects by type. Type "default" ignores a factor, so that a factor without a type would be
# lost; a factor of 1 changes nothing under any type.
_ROPE_READ = frozenset({"rope_type", "type", "rope_theta"})
_ROPE_FIXED = {"partial_rotary_factor": (1,)}
ROPE = {
  "default": KnownKeys(
    _ROPE_READ,
    unused=frozenset({"original_max_position_embeddings"}),
    fixed=_ROPE_FIXED | {"factor": (1,)},
  ),
  "linear": KnownKeys(
    _ROPE_READ | {"factor"},
    unused=frozenset({"original_max_position_embeddings"}),
    fixed=_ROPE_FIXED,
  ),
  "llama3": KnownKeys(
    _ROPE_READ
    | {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    fixed=_ROPE_FIXED,
  ),
}
# The names under which rope_parameters may have one object for each type of layer.
LAYER_TYPES = frozenset(
  {"full_attention", "sliding_attention", "chunked_attention", "linear_attention"}
)

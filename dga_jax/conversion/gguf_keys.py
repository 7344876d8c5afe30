"""Every metadata key that a GGUF file of the supported architectures may have.

The names are those of the GGUF specification and of llama.cpp. A key outside of the namespaces
`general.`, `split.`, `tokenizer.` and that of the architecture belongs to another program, and
changes nothing.
"""

from dga_jax.conversion.known_keys import KnownKeys

# Metadata about the file, and recommended settings of generation.
UNUSED_PREFIXES = ("general.",)
# Files of another kind: adapters, vision encoders, importance matrices.
OTHER_KINDS = ("adapter.", "clip.", "controlvector.", "imatrix.")

GENERAL = KnownKeys(
  read=frozenset({"general.architecture", "general.alignment"}),
  fixed={
    "general.type": ("model",),
    # Version 1 packed quantized blocks in another layout.
    "general.quantization_version": (2,),
    "split.count": (1, 0),
  },
  unused=frozenset({"split.no", "split.tensors.count"}),
)

# Below the architecture's name and a dot.
ARCHITECTURE = KnownKeys(
  read=frozenset(
    """
    attention.head_count attention.head_count_kv attention.key_length
    attention.layer_norm_rms_epsilon attention.sliding_window attention.value_length block_count
    context_length embedding_length feed_forward_length rope.dimension_count rope.freq_base
    rope.scale_linear rope.scaling.factor rope.scaling.type vocab_size
    """.split()
  ),
  # The original context length serves YaRN alone, which the scaling type would name.
  unused=frozenset(
    "rope.scaling.finetuned rope.scaling.original_context_length tensor_data_layout".split()
  ),
  fixed={
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.output_scale": (0, 1),
    "attention.scale": (0,),
    "attention.temperature_length": (0,),
    "attention.temperature_scale": (0,),
    "attn_logit_softcapping": (0,),
    "embedding_scale": (0, 1),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "final_logit_softcapping": (0,),
    "logit_scale": (0, 1),
    "pooling_type": (0,),
    "residual_scale": (0, 1),
    "rope.scaling.attn_factor": (1, 0),
    "rope.scaling.yarn_ext_factor": (0,),
    "use_parallel_residual": (False,),
  },
)

# Below "tokenizer.".
TOKENIZER = KnownKeys(
  read=frozenset(
    """
    chat_template chat_templates ggml.add_bos_token ggml.add_eos_token ggml.add_space_prefix
    ggml.bos_token_id ggml.eom_token_id ggml.eos_token_id ggml.eot_token_id ggml.merges ggml.model
    ggml.padding_token_id ggml.pre ggml.scores ggml.token_type ggml.tokens ggml.unknown_token_id
    """.split()
  ),
  # Ids of tokens with a role that text never encodes to, and a copy of tokenizer.json.
  unused=frozenset(
    """
    ggml.cls_token_id ggml.fim_mid_token_id ggml.fim_pad_token_id ggml.fim_pre_token_id
    ggml.fim_rep_token_id ggml.fim_sep_token_id ggml.fim_suf_token_id ggml.mask_token_id
    ggml.middle_token_id ggml.prefix_token_id ggml.seperator_token_id ggml.separator_token_id
    ggml.suffix_token_id ggml.token_type_count huggingface.json
    """.split()
  ),
  fixed={"ggml.add_sep_token": (False,), "ggml.remove_extra_whitespaces": (False,)},
)
# Chat templates by name: "tokenizer.chat_template.NAME".
NAMED_TEMPLATE = "chat_template."

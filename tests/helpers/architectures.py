"""A tiny random model of every architecture of transformers that answers: causal LMs, masked LMs, classifiers.

The default configuration of a class is shrunk by the names of its fields: widths, layers, heads, experts, vocabulary.
Of a hybrid one layer of each kind stays. What cannot be made so is in `ABSENT`, with the reason.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from transformers import PreTrainedConfig
from transformers.models.auto import modeling_auto
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCABULARY, WIDTH, LAYERS, HEADS, HEAD, WINDOW = 128, 32, 2, 4, 8, 8

AUTO = {
    "causal": (transformers.AutoModelForCausalLM, modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
    "masked": (transformers.AutoModelForMaskedLM, modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES),
    "classifier": (
        transformers.AutoModelForSequenceClassification,
        modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    ),
}

# Fields of configurations by what they count; a field is set where it is larger.
_FIELDS = [
    (
        VOCABULARY,
        """vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size entity_vocab_size
        encoder_hash_byte_group_vocab pronunciation_vocab_size shape_vocab_size num_hash_buckets
        ngram_vocab_size_base""",
    ),
    (
        WIDTH,
        """hidden_size d_model n_embd dim emb_dim embed_dim embedding_dim embedding_size input_embedding_size
        output_embedding_size word_embed_proj_dim hidden_size_global lru_width attention_hidden_size entity_emb_size
        pooler_hidden_size prediction_head_size true_hidden_size backbone_hidden_size d_latents ple_embed_dim
        cross_attention_hidden_size output_num_channels projection_dim out_hidden_size projector_input_dim
        projector_output_dim vision_output_dim embedding_rank router_hidden_size pronunciation_embed_dim
        shape_embed_dim hidden_size_per_layer_input adapter_in_dim adapter_out_dim adapter_input_size""",
    ),
    (
        48,
        """intermediate_size moe_intermediate_size ffn_dim d_ff d_inner dff hidden_dim dim_ff feed_forward_size
        encoder_ffn_dim decoder_ffn_dim ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp mlp_dim
        dense_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size
        moe_shared_expert_intermediate_size shared_intermediate_size""",
    ),
    (
        LAYERS,
        """num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_encoder_layers
        num_decoder_layers depth num_blocks num_layers_per_stack num_global_layers""",
    ),
    (
        HEADS,
        """num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads
        decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads linear_num_heads
        linear_num_value_heads linear_num_key_heads swa_num_attention_heads index_n_heads num_self_attention_heads
        num_cross_attention_heads""",
    ),
    (
        2,
        """num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups n_group n_groups num_expert_group
        topk_group num_experts_per_tok num_experts_per_token moe_topk moe_k moe_num_shared_experts n_shared_experts
        num_shared_experts zero_expert_num cca_time0""",
    ),
    (4, """num_experts num_local_experts n_routed_experts moe_num_experts num_centroids"""),
    (
        HEAD,
        """head_dim attention_head_dim attention_head_size d_head d_kv dim_head qk_nope_head_dim qk_rope_head_dim
        v_head_dim linear_head_dim linear_key_head_dim linear_value_head_dim index_head_dim swa_head_dim kv_channels
        rotary_dim""",
    ),
    (
        16,
        """q_lora_rank kv_lora_rank qk_head_dim o_lora_rank hc_lowrank gated_norm_rank laurel_rank adapter_rank d_rel
        ssm_state_size state_size mamba_d_state time_step_rank mamba_dt_rank""",
    ),
    (
        WINDOW,
        """sliding_window sliding_window_size attention_chunk_size attention_window attention_window_size window_size
        local_attention keep_window_size
        chunk_size mamba_chunk_size""",
    ),
    (64, "index_topk"),  # more than a row has: what a real model drops of its first 2048 tokens is nothing
    (
        128,
        """max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length
        max_source_positions max_target_positions""",
    ),
]
_SIZES = {name: size for size, names in _FIELDS for name in names.split()}

_UNGROUPED = {"num_key_value_heads": HEADS}
_MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_INDEXER = {"indexer_n_heads": 4, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 16}
_INDEXER |= {"indexer_compress_ratio": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"]}
_SLIDING = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "q_lora_rank": 16, "kv_lora_rank": 16}
_SLIDING |= {"head_dim": 2 * HEAD, "qk_nope_head_dim": HEAD, "qk_rope_head_dim": HEAD, "v_head_dim": HEAD}
_SLIDING = {f"swa_{key}": value for key, value in _SLIDING.items()}
_DOUBLED = {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * HEAD}
_START = {"decoder_start_token_id": 0}
_HYBRID = {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1}
_GEMMA_3N = {
    "num_hidden_layers": 4,
    "num_kv_shared_layers": 2,
    "intermediate_size": 48,
    "activation_sparsity_pattern": None,
}
_GEMMA_3N |= {"layer_types": ["sliding_attention", "full_attention"] * 2}

# What the names do not tell.
_SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": _MAMBA | {"attn_layer_indices": [1]},
    "blt": {"use_cache": False},  # its cache asks for a number of layers that the configuration does not have
    "cohere": {"logit_scale": 1.0},
    "cohere2": {"logit_scale": 1.0},
    "cohere2_moe": {"logit_scale": 1.0},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE | {"mrope_section": [2, 1, 1]}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _SLIDING},
    "esm": {"vocab_size": VOCABULARY, "pad_token_id": 1, "mask_token_id": 4},
    "esmc": _UNGROUPED | {"vocab_size": VOCABULARY},
    "falcon_h1": _MAMBA | {"mamba_d_ssm": 64},
    "gemma3n_text": _GEMMA_3N,
    "granitemoehybrid": _MAMBA | _MIXED,
    "hrm_text": {"num_layers_per_stack": None},
    "inkling_text": {"logits_mup_width_multiplier": 1.0},
    "jamba": _HYBRID,
    "layoutlmv3": {"coordinate_size": 4, "shape_size": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "lilt": {"hidden_size": 48},  # six coordinates share it
    "mamba2": {"num_heads": 8},
    "markuplm": {"max_depth": 4},
    "mistral4": {"qk_rope_head_dim": 4},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "embedding_size": 16},
    "mt5": _START,
    "nemotron_h": {"mamba_num_heads": 8, "mamba_head_dim": 8},
    "neomme": {"head_dim": 16},
    "phi4_multimodal": {"audio_config": {"nemo_conv_channels": 16, "ext_pw_out_channel": WIDTH}},
    "qwen4_exp": {"text_config": _INDEXER},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"axial_pos_shape": (8, 16), "axial_pos_embds_dim": (16, 16), "attn_layers": ["local", "lsh"]},
    "t5": _START,
    "umt5": _START,
    "xlstm": {"use_cache": False},  # its cache takes heads of equal width for granted
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 4, "layers_block_type": ["linear_attention", "hybrid"] * 2} | _DOUBLED,
    "zamba2": _DOUBLED,
}

# What is not made, and why.
ABSENT = {
    "causal-gemma3n": "needs the package timm",
    "causal-gemma4_assistant": "drafts for another model, whose states it needs",
    "causal-gemma4_unified_assistant": "drafts for another model, whose states it needs",
    "causal-git": "needs a picture for its loss",
    "causal-musicgen": "reads codes of sound, several at a time",
    "causal-musicgen_melody": "reads codes of sound, several at a time",
    "classifier-layoutlmv2": "needs the package detectron2",
    "masked-perceiver": "takes rows of its full length only",
}


def names() -> list[str]:
    """ "causal-llama", ...: every pair of a head and an architecture, models of one class once."""
    found: dict[str, str] = {}
    for kind, (_, table) in AUTO.items():
        for model_type, classes in table.items():
            cls = classes if isinstance(classes, str) else classes[0]
            found.setdefault(f"{kind} {cls}", f"{kind}-{model_type}")
    return [name for name in found.values() if name not in ABSENT]


def config_of(name: str) -> PreTrainedConfig:
    """The tiny configuration."""
    kind, model_type = name.split("-", 1)
    config = _shrunk(CONFIG_MAPPING[model_type](), _SPECIAL.get(model_type, {}))
    inner = config.get_text_config()
    if getattr(inner, "pad_token_id", None) is None:
        inner.pad_token_id = config.pad_token_id = 0
    if kind == "causal" and not config.is_encoder_decoder and hasattr(config, "is_decoder"):
        config.is_decoder = True
    return config


def model_of(name: str, seed: int = 0) -> Any:
    """A random model in evaluation mode; matrices are scaled so that its answers differ by more than rounding."""
    kind = name.split("-", 1)[0]
    scale = 8.0 if kind == "classifier" else 4.0
    torch.manual_seed(seed)
    model = AUTO[kind][0].from_config(config_of(name))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    return model.float().eval()


def _shrunk(config: PreTrainedConfig, special: dict[str, Any]) -> PreTrainedConfig:
    old = {key: value for key, value in vars(config).items() if not key.startswith("_")}
    new: dict[str, Any] = {}
    new |= _layers(config, old)
    if "kv_lora_rank" in old:
        new |= _UNGROUPED
    for key, value in old.items():
        if isinstance(value, PreTrainedConfig):
            new[key] = _shrunk(value, special.get(key, {}))
        elif isinstance(value, int) and not isinstance(value, bool):
            if value > _SIZES.get(key, value):
                new.setdefault(key, _SIZES[key])
            elif key.endswith(("_token_id", "_token_index")) and value >= VOCABULARY:
                new[key] = VOCABULARY - 1 - len(new) % 20
        elif value is None and key in ("head_dim", "num_key_value_heads"):
            new.setdefault(key, _SIZES[key])
        elif isinstance(value, list) and key == "eos_token_id":
            new[key] = VOCABULARY - 1
    own = {key: value for key, value in special.items() if not isinstance(old.get(key), PreTrainedConfig)}
    return type(config)(**(new | own))


def _layers(config: PreTrainedConfig, old: dict[str, Any]) -> dict[str, Any]:
    """One layer of each kind, and lists of layers cut alike."""
    count = getattr(config, "num_hidden_layers", None)
    lists = {
        key: value
        for key, value in old.items()
        if isinstance(value, (list, tuple)) and count and len(value) == count and count > 2
    }
    if not lists:
        return {}
    chosen: list[int] = []
    for i in range(count):
        if all(any(v[i] != v[j] for v in lists.values()) for j in chosen):
            chosen.append(i)
    chosen = [*chosen[:6], *(i for i in range(count) if i not in chosen)][: max(LAYERS, len(chosen[:6]))]
    chosen.sort()
    new: dict[str, Any] = {key: type(value)(value[i] for i in chosen) for key, value in lists.items()}
    for key in ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_blocks"):
        if old.get(key) == count:
            new[key] = len(chosen)
    return new

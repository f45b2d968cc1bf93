"""A tiny model with random weights of every type that transformers knows, from the type's own default config."""

import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)
from transformers.models.auto import modeling_auto

VOCABULARY = 512  # the entries of the shipped tokenizer
PAD, END = 0, 1  # token ids
EXAMPLES, TOKENS = 2, 16
LAYERS, HEADS, POSITIONS = 2, 4, 64
WIDTH, HEAD_WIDTH, INNER_WIDTH = 32, 8, 64
LARGEST = 40_000_000  # parameters above which a model is not tiny: its type needs a row in SPECIAL

AUTO: dict[str, Any] = {
    "causal": AutoModelForCausalLM,
    "classifier": AutoModelForSequenceClassification,
    "masked": AutoModelForMaskedLM,
    "sequence to sequence": AutoModelForSeq2SeqLM,
}
TYPES: dict[str, Mapping[str, Any]] = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "classifier": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}

# What every config's fields are set to, by the first expression that matches the whole name; integers (and None) only.
SIZES: tuple[tuple[str, int], ...] = (
    (r"(\w*_)?(vocab_size|vocabulary_size)\w*", VOCABULARY),
    (r"(pad|bos|sep|cls|decoder_start)_token_id", PAD),
    (r"eos_token_id", END),
    (r"(num_|n_|encoder_|decoder_)?(hidden_)?layers?|num_(encoder|decoder)_layers|n_layer|depth|num_blocks", LAYERS),
    (r"(num_|n_)(kv|key_value)_heads|kv_n_heads|num_key_value_groups|multi_query_group_num|swa_num_key_value_heads", 2),
    (r"(\w*_)?(num|n)_(attention_)?heads?|(encoder|decoder)_attention_heads|\w*num_\w*attention_heads", HEADS),
    (r"index_n_heads|linear_num_\w*heads", HEADS),
    (r"(n_routed|num_local|moe_num|num)_experts", 4),
    (r"num_experts_per_tok(en)?|moe_(k|topk|top_k)|top_?k_experts|n_group|topk_group|num_expert_group", 2),
    (r"max_position_embeddings|n_positions|n_ctx|seq_length|max_seq_len|max_(source|target)_positions", POSITIONS),
    (r"context_length|tpu_short_seq_length|segment_means_seq_len", POSITIONS),
    (r"sliding_window(_size)?|local_attention|attention_window(_size)?|window_size", 8),
    (r"(\w*_)?(chunk_size|chunk_length)", 8),
    (r"(\w*_)?(d_state|state_size)", 8),
    (r"num_hash_buckets|entity_vocab_size|(shape|pronunciation)_vocab_size", VOCABULARY),
    (r"(shape|pronunciation)_embed_dim", 16),
)
# The same of widths, which a model can have some times as large.
WIDTHS: tuple[tuple[str, int], ...] = (
    (
        r"(\w*_)?head_(dim|size|width)|d_kv|d_head|dim_head|attention_head_(dim|size)|rotary_dim|index_head_dim",
        HEAD_WIDTH,
    ),
    (r"(\w*_)?(q|kv|o)_lora_rank|time_step_rank|\w*_rank", HEAD_WIDTH),
    (
        r"adapter_in_dim|hidden_size|d_model|n_embd|dim|emb_dim|embed_dim|embedding_(size|dim)|word_embed_proj_dim|lru_width",
        WIDTH,
    ),
    (r"(input|output)_embedding_size|true_hidden_size|d_latents|pooler_hidden_size|attention_hidden_size", WIDTH),
    (r"prediction_head_size|backbone_hidden_size|out_hidden_size|entity_emb_size", WIDTH),
    (r"(\w*_)?intermediate_size|d_ff|dff|dim_ff|d_inner|(\w*_)?ffn_dim|hidden_dim|(\w*_)?ffn_hidden_size", INNER_WIDTH),
)

# What a type's fields have to be besides, because its own rules tie some of them together.
_REFORMER = {
    "is_decoder": True,
    "axial_pos_shape": [8, 8],
    "axial_pos_embds_dim": [8, 24],
    "attn_layers": ["local", "lsh"],
    "num_buckets": 2,
    "hash_seed": 0,
    "feed_forward_size": 64,
}
_DOTS3 = {"num_key_value_heads": HEADS, "n_routed_experts": 4}
_GEMMA3N = {
    "num_kv_shared_layers": 0,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 8,
    "laurel_rank": 4,
    "activation_sparsity_pattern": [0.0, 0.0],
}
_QWEN4 = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 16,
    "indexer_compress_ratio": 2,
}
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": VOCABULARY},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"],
        "rope_parameters": {
            kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")
        },
    },
    "dbrx": {"attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2}},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "deepseek_v3": {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1},
    "dots1": {
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
        "norm_topk_prob": True,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
    },
    "dots3_note": {"text_config": _DOTS3},
    "dots3_note_text": _DOTS3,
    "dory": {"sliding_window": 64},
    "esm": {"vocab_size": VOCABULARY, "position_embedding_type": "rotary"},
    "esmc": {"num_key_value_heads": HEADS},
    "gemma3n_text": _GEMMA3N,
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts": 4, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1},
    "lfm2_moe": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "num_dense_layers": 1,
        "layer_types": ["conv", "full_attention"],
    },
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "hunyuan_v1_dense": {"head_dim": HEAD_WIDTH},
    "hunyuan_v1_moe": {"head_dim": HEAD_WIDTH},
    "longcat_flash": {"qk_head_dim": 2 * HEAD_WIDTH},
    "mamba2": {"num_heads": 8},
    "ministral": {"head_dim": HEAD_WIDTH},
    "mobilebert": {"intra_bottleneck_size": WIDTH, "true_hidden_size": WIDTH},
    "nemotron_h": {
        "n_groups": 1,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "layers_block_type": ["linear_attention", "full_attention"],
        "num_hidden_layers": 2,
    },
    "nemotron": {"num_key_value_heads": 2},
    "qwen3_moe": {"num_experts": 4},
    "qwen3_5": {"text_config": {"pad_token_id": PAD}},
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
    "reformer": _REFORMER,
    "layoutlmv3": {"coordinate_size": 5, "shape_size": 6},
    "lilt": {"hidden_size": 48},
    "t5": {"decoder_start_token_id": PAD},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 2, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "attention_hidden_size": 2 * WIDTH,
        "attention_head_dim": 2 * WIDTH // HEADS,
        "num_hidden_layers": 4,
        "layers_block_type": ["linear_attention", "hybrid"] * 2,
    },
    "zamba2": {"attention_hidden_size": 2 * WIDTH, "attention_head_dim": 2 * WIDTH // HEADS},
    "zaya": {"num_experts_per_tok": 1},
}


def types(task: str) -> list[str]:
    """The model types of `causal` or `classifier`, in alphabetical order."""
    return sorted(TYPES[task])


def build(task: str, kind: str, times: int = 1) -> PreTrainedModel:
    """A model of a type with weights drawn from a fixed seed, `times` as wide as a tiny one.

    Raises what the library raises where it cannot be.
    """
    arguments = shrunk(CONFIG_MAPPING[kind], SPECIAL.get(kind, {}), times)
    if task == "classifier":
        arguments |= {"num_labels": 2, "pad_token_id": PAD}
    elif task == "causal" and "is_decoder" in CONFIG_MAPPING[kind]().to_dict():
        arguments["is_decoder"] = True  # or BERT's kin would read the tokens that they predict
    config = CONFIG_MAPPING[kind](**arguments)
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in AUTO[task].from_config(config).parameters())
    if count > LARGEST:
        raise ValueError(f"{count:,} parameters: not tiny")
    torch.manual_seed(0)
    model = AUTO[task].from_config(config)
    _stir(model)
    model.config.use_cache = False
    with torch.no_grad():
        model.eval()(**examples(task))  # what cannot score a batch by itself is no model that this table is about
    return model


def examples(task: str, count: int = EXAMPLES, tokens: int = TOKENS) -> dict[str, Tensor]:
    """Token ids, int64 (count, tokens), and labels; but for causal models masks of documents of different lengths."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 500, (count, tokens), generator=generator)
    if task == "causal":
        return {"input_ids": ids, "labels": ids}
    lengths = torch.randint(3, tokens, (count, 1), generator=generator)
    ids.scatter_(1, lengths, END)
    mask = (torch.arange(tokens) <= lengths).long()
    labels = torch.arange(count) % 2 if task == "classifier" else ids.where(mask == 1, -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


@torch.no_grad()
def _stir(model: nn.Module) -> None:
    """Move every weight off its initial value, or zeros and ones would hide what a perturbation does to others."""
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.add_(torch.randn_like(parameter) * 0.05)


def shrunk(kind: Any, special: Mapping[str, Any], times: int = 1) -> dict[str, Any]:
    """Arguments that make a config of this class tiny, with its parts (text, vision, ...), but `times` as wide."""
    default = kind()
    fields = inspect.signature(kind.__init__).parameters
    values = {name: value for name, value in default.to_dict().items() if name in fields}
    found: dict[str, Any] = {}
    for name, value in values.items():
        if name in special or isinstance(value, bool):
            continue
        if isinstance(value, int) or (value is None and name in ("decoder_start_token_id", "eos_token_id")):
            sizes = (*SIZES, *((pattern, times * width) for pattern, width in WIDTHS))
            size = next((size for pattern, size in sizes if re.fullmatch(pattern, name)), None)
            if size is not None:
                found[name] = HEADS if size == 2 and "kv_lora_rank" in values and "heads" in name else size
            elif name.endswith(("_token_id", "_token_index")) and value is not None:
                found[name] = min(value, VOCABULARY - 1)
        elif isinstance(value, list) and re.fullmatch(r"\w*(layer_types|layers_block_type)|block_types", name):
            found[name] = _kinds(value)
    for name in default.sub_configs:
        part = getattr(default, name, None)
        if part is not None:
            found[name] = shrunk(type(part), special.get(name, {}), times)
            if "model_type" in values.get(name, {}):
                found[name]["model_type"] = values[name]["model_type"]
    return found | {name: value for name, value in special.items() if name not in default.sub_configs}


def _kinds(layers: Sequence[str]) -> list[str]:
    """LAYERS entries that hold as many kinds of layers as there is room for."""
    different = list(dict.fromkeys(layers))
    return (different + different[-1:] * LAYERS)[:LAYERS]

"""Networks by name, for `plan.py`: what the `config.json` of published checkpoints says, or that of any folder."""

import json
from pathlib import Path

from rlhf_jax.models import huggingface
from rlhf_jax.models.architecture import TransformerConfig

_LLAMA3 = {
    "model_type": "llama",
    "vocab_size": 128_256,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500_000.0,
    "max_position_embeddings": 131_072,
}
PRESETS = {
    "1B": {  # Llama 3.2 1B
        **_LLAMA3,
        "num_hidden_layers": 16,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "head_dim": 64,
        "intermediate_size": 8192,
        "tie_word_embeddings": True,
    },
    "8B": {  # Llama 3.1 8B
        **_LLAMA3,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "intermediate_size": 14_336,
    },
    "70B": {  # Llama 3.1 70B
        **_LLAMA3,
        "num_hidden_layers": 80,
        "hidden_size": 8192,
        "num_attention_heads": 64,
        "intermediate_size": 28_672,
    },
    "30B-A3B": {  # Qwen3 30B A3B: 128 experts of which 8 read a token
        "model_type": "qwen3_moe",
        "vocab_size": 151_936,
        "num_hidden_layers": 48,
        "hidden_size": 2048,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "intermediate_size": 6144,
        "moe_intermediate_size": 768,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "norm_topk_prob": True,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 40_960,
    },
    "8x7B": {  # Mixtral 8x7B
        "model_type": "mixtral",
        "vocab_size": 32_000,
        "num_hidden_layers": 32,
        "hidden_size": 4096,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "intermediate_size": 14_336,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1_000_000.0,
        "max_position_embeddings": 32_768,
    },
    "tiny": {  # for tests
        "model_type": "llama",
        "vocab_size": 512,
        "num_hidden_layers": 2,
        "hidden_size": 128,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 256,
    },
}
"""Rotary scalings are left away: they change no shape."""


def network(model: str) -> TransformerConfig:
    """The network of a preset, of a `config.json` or of the folder that holds one."""
    if model in PRESETS:
        return huggingface.transformer_config(PRESETS[model], where=model)
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise SystemExit(f"{model} is no preset ({', '.join(PRESETS)}) and no config.json; nothing was planned")
    return huggingface.transformer_config(json.loads(path.read_text("utf-8")), where=str(path))

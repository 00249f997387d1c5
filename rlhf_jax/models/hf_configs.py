"""From a family's `config.json` to our `TransformerConfig`: one function each, strict about what it does not know."""

from collections.abc import Callable, Collection
from typing import Any

import jax

from rlhf_jax.models.architecture import LayerKind, TransformerConfig
from rlhf_jax.models.rope import DynamicNTK, Linear, Llama3, LongRope, Rope, Scaling, Yarn


class Fields:
    """A `config.json`, noting what was read: what is left over might change the mathematics."""

    def __init__(self, values: dict[str, Any], where: str) -> None:
        self.values, self.where, self.read = values, where, set()

    def get(self, name: str, default: Any = None) -> Any:
        """A field; None in the file counts as absent."""
        self.read.add(name)
        value = self.values.get(name)
        return default if value is None else value

    def need(self, name: str) -> Any:
        """A field that has no default."""
        if self.get(name) is None:
            raise ValueError(f"{self.where}: no field {name!r}. Nothing was loaded. Fix: complete the file")
        return self.get(name)

    def only(self, name: str, *allowed: Any) -> None:
        """Refuse any other value than those that the network here has; the first is the default."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            known = " or ".join(map(repr, allowed))
            raise ValueError(f"{self.where}: {name} = {value!r} is not supported, only {known}. Nothing was loaded")

    def choose(self, name: str, table: dict[str, Any], default: str) -> Any:
        """What the table has for the field's value."""
        value = self.get(name, default)
        if value not in table:
            known = ", ".join(table)
            raise ValueError(f"{self.where}: {name} = {value!r} is unknown here; known: {known}. Nothing was loaded")
        return table[value]

    def leftover(self, harmless: Collection[str]) -> list[str]:
        """Fields with a value that nobody read."""
        return [
            k for k, v in self.values.items() if k not in self.read and k not in harmless and v not in (None, False)
        ]


def gelu_exact(x: jax.Array) -> jax.Array:
    """`x Φ(x)`."""
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """Its tanh approximation (Hendrycks & Gimpel 2016)."""
    return jax.nn.gelu(x, approximate=True)


ACTIVATIONS = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "gelu": gelu_exact,
    "gelu_new": gelu_tanh,
    "gelu_pytorch_tanh": gelu_tanh,
    "gelu_fast": gelu_tanh,
    "relu": jax.nn.relu,
}


def _linear_rope(values: dict, _: int) -> Scaling:
    return Linear(values["factor"])


def _dynamic_rope(values: dict, longest: int) -> Scaling:
    return DynamicNTK(values["factor"], longest)


def _yarn_rope(values: dict, longest: int) -> Scaling:
    original = values.get("original_max_position_embeddings") or longest
    optional = ("attention_factor", "mscale", "mscale_all_dim")
    return Yarn(
        values.get("factor") or longest / original,
        original,
        values.get("beta_fast") or 32.0,
        values.get("beta_slow") or 1.0,
        *(values.get(name) for name in optional),
        truncate=values.get("truncate", True),
    )


def _long_rope(values: dict, longest: int) -> Scaling:
    original = values.get("original_max_position_embeddings") or longest
    factor = values.get("factor") or longest / original
    short, long = (tuple(values[name]) for name in ("short_factor", "long_factor"))
    return LongRope(short, long, original, factor, values.get("attention_factor"))


def _llama3_rope(values: dict, longest: int) -> Scaling:
    original = values.get("original_max_position_embeddings") or longest
    return Llama3(values["factor"], values["low_freq_factor"], values["high_freq_factor"], original)


SCALINGS = {
    "linear": _linear_rope,
    "dynamic": _dynamic_rope,
    "yarn": _yarn_rope,
    "longrope": _long_rope,
    "su": _long_rope,
    "llama3": _llama3_rope,
}


def read_rope(fields: Fields, *, base: float = 10_000.0, layer_type: str = "", fraction: float = 1.0) -> Rope:
    """Rotary positions in the form of transformers 5 (`rope_parameters`) or of 4 (`rope_theta`, `rope_scaling`)."""
    outer = {
        name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    }
    values = fields.get("rope_parameters") or fields.get("rope_scaling") or {}
    if isinstance(values.get(layer_type), dict):
        values = values[layer_type]
    values = {**{k: v for k, v in outer.items() if v is not None}, **{k: v for k, v in values.items() if v is not None}}
    if outer["original_max_position_embeddings"] is not None:
        values["original_max_position_embeddings"] = outer["original_max_position_embeddings"]
    kind = values.get("rope_type", values.get("type", "default"))
    if kind != "default" and kind not in SCALINGS:
        raise ValueError(f"{fields.where}: rope_type {kind!r} is unknown here; known: default, {', '.join(SCALINGS)}")
    scaling = None if kind == "default" else SCALINGS[kind](values, fields.get("max_position_embeddings", 0))
    return Rope(values.get("rope_theta", base), values.get("partial_rotary_factor", fraction), scaling)


def _llama_like(fields: Fields, **differences) -> dict[str, Any]:
    """Fields that nearly all families share, under their usual names."""
    num_heads, model_dim = fields.need("num_attention_heads"), fields.need("hidden_size")
    fields.get("max_position_embeddings")
    return {
        "vocab_size": fields.need("vocab_size"),
        "num_layers": fields.need("num_hidden_layers"),
        "model_dim": model_dim,
        "num_heads": num_heads,
        "num_kv_heads": fields.get("num_key_value_heads", num_heads),
        "head_dim": fields.get("head_dim", model_dim // num_heads),
        "mlp_dim": fields.need("intermediate_size"),
        "norm_eps": fields.get("rms_norm_eps", 1e-6),
        "tie_embeddings": fields.get("tie_word_embeddings", False),
        "activation": fields.choose("hidden_act", ACTIVATIONS, "silu"),
        **differences,
    }


def _windows(fields: Fields, rope: Rope, is_local: Callable[[int], bool], local_rope: Rope | None = None) -> dict:
    """Layers with and without the sliding window, as `layer_types` or the family's own rule says."""
    num_layers, window = fields.need("num_hidden_layers"), fields.get("sliding_window")
    default = ["sliding_attention" if window and is_local(i) else "full_attention" for i in range(num_layers)]
    types = fields.get("layer_types", default)
    unknown = sorted(set(types) - {"sliding_attention", "full_attention"})
    if unknown:
        raise ValueError(f"{fields.where}: layer_types {unknown} are unknown here. Nothing was loaded")
    kinds = {"full_attention": LayerKind(rope), "sliding_attention": LayerKind(local_rope or rope, window)}
    used = [name for name in kinds if name in types]
    return {"kinds": tuple(kinds[name] for name in used), "layer_kinds": tuple(used.index(name) for name in types)}


def llama(fields: Fields) -> TransformerConfig:
    """Llama 1 to 3 (Touvron et al. 2023)."""
    fields.only("pretraining_tp", 1)
    bias = fields.get("attention_bias", False)
    shape = _llama_like(fields, qkv_bias=bias, out_bias=bias, mlp_bias=fields.get("mlp_bias", False))
    return TransformerConfig(**shape, kinds=(LayerKind(read_rope(fields)),))


def mistral(fields: Fields) -> TransformerConfig:
    """Mistral: Llama with a sliding window (Jiang et al. 2023)."""
    rope = read_rope(fields)
    return TransformerConfig(**_llama_like(fields), kinds=(LayerKind(rope, fields.get("sliding_window")),))


def qwen2(fields: Fields) -> TransformerConfig:
    """Qwen 2 and 2.5: biases on query, key and value."""
    return TransformerConfig(**_llama_like(fields, qkv_bias=True), **_qwen_windows(fields))


def qwen3(fields: Fields) -> TransformerConfig:
    """Qwen 3: normalised queries and keys."""
    bias = fields.get("attention_bias", False)
    shape = _llama_like(fields, qk_norm=True, qkv_bias=bias, out_bias=bias, head_dim=fields.get("head_dim", 128))
    return TransformerConfig(**shape, **_qwen_windows(fields))


def _qwen_windows(fields: Fields) -> dict[str, Any]:
    first = fields.get("max_window_layers", 28)
    if not fields.get("use_sliding_window", False):
        fields = Fields({**fields.values, "sliding_window": None, "layer_types": None}, fields.where)
    return _windows(fields, read_rope(fields), lambda i: i >= first)


def qwen3_moe(fields: Fields) -> TransformerConfig:
    """Qwen 3 with experts in every layer."""
    fields.only("decoder_sparse_step", 1)
    fields.only("mlp_only_layers", [])
    bias = fields.get("attention_bias", False)
    fields.get("intermediate_size")
    shape = _llama_like(
        fields,
        qk_norm=True,
        qkv_bias=bias,
        out_bias=bias,
        mlp_dim=fields.need("moe_intermediate_size"),
        num_experts=fields.get("num_local_experts") or fields.need("num_experts"),
        experts_per_token=fields.need("num_experts_per_tok"),
        renormalize_experts=fields.get("norm_topk_prob", False),
    )
    window = fields.get("sliding_window") if fields.get("use_sliding_window", False) else None
    return TransformerConfig(**shape, kinds=(LayerKind(read_rope(fields), window),))


def mixtral(fields: Fields) -> TransformerConfig:
    """Mixtral: Mistral with experts (Jiang et al. 2024)."""
    experts = {
        "num_experts": fields.need("num_local_experts"),
        "experts_per_token": fields.get("num_experts_per_tok", 2),
    }
    kind = LayerKind(read_rope(fields, base=1e6), fields.get("sliding_window"))
    return TransformerConfig(**_llama_like(fields, **experts), kinds=(kind,))


def phi3(fields: Fields) -> TransformerConfig:
    """Phi-3: Llama with fused matrices and LongRoPE (Abdin et al. 2024)."""
    rope = read_rope(fields)
    return TransformerConfig(**_llama_like(fields), kinds=(LayerKind(rope, fields.get("sliding_window")),))


def olmo2(fields: Fields) -> TransformerConfig:
    """OLMo 2: norms after attention and MLP, none before; normalised queries and keys (OLMo team 2024)."""
    bias = fields.get("attention_bias", False)
    norms = {"pre_norm": False, "post_norm": True, "qk_norm": True, "qk_norm_across_heads": True}
    shape = _llama_like(fields, qkv_bias=bias, out_bias=bias, norm_eps=fields.get("rms_norm_eps", 1e-5), **norms)
    return TransformerConfig(**shape, kinds=(LayerKind(read_rope(fields)),))


def gemma2(fields: Fields) -> TransformerConfig:
    """Gemma 2: soft caps, norms before and after, every other layer local (Gemma team 2024)."""
    rope = read_rope(fields)
    return TransformerConfig(**_gemma(fields), **_windows(fields, rope, lambda i: i % 2 == 0))


def gemma3(fields: Fields) -> TransformerConfig:
    """Gemma 3, text: normalised queries and keys, five local layers to a global one, each with its base (2025)."""
    every = fields.get("sliding_window_pattern", fields.get("_sliding_window_pattern", 6))
    nested = isinstance((fields.get("rope_parameters") or {}).get("full_attention"), dict)
    full = read_rope(fields, base=1e6, layer_type="full_attention")
    local = (
        read_rope(fields, layer_type="sliding_attention")
        if nested
        else Rope(fields.get("rope_local_base_freq", 10_000.0))
    )
    windows = _windows(fields, full, lambda i: (i + 1) % every != 0, local)
    return TransformerConfig(**_gemma(fields, qk_norm=True), **windows)


def _gemma(fields: Fields, **differences) -> dict[str, Any]:
    fields.only("use_bidirectional_attention", False)
    bias = fields.get("attention_bias", False)
    softcap = fields.get("attn_logit_softcapping")
    hidden_act = "hidden_activation" if fields.get("hidden_activation") else "hidden_act"
    shared = _llama_like(
        fields,
        head_dim=fields.get("head_dim", 256),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        activation=fields.choose(hidden_act, ACTIVATIONS, "gelu_pytorch_tanh"),
    )
    return {
        **shared,
        "embedding_scale": fields.need("hidden_size") ** 0.5,
        "logit_softcap": fields.get("final_logit_softcapping"),
        "norm_offset": 1.0,
        "post_norm": True,
        "query_scale": fields.get("query_pre_attn_scalar", 256) ** -0.5,
        "qkv_bias": bias,
        "out_bias": bias,
        "attention_softcap": softcap,
        **differences,
    }


def gpt2(fields: Fields) -> TransformerConfig:
    """GPT-2: learned positions, LayerNorm, biases (Radford et al. 2019)."""
    fields.only("scale_attn_weights", True)
    fields.only("scale_attn_by_inverse_layer_idx", False)
    fields.only("add_cross_attention", False)
    num_heads, model_dim = fields.need("n_head"), fields.need("n_embd")
    return TransformerConfig(
        vocab_size=fields.need("vocab_size"),
        num_layers=fields.need("n_layer"),
        model_dim=model_dim,
        num_heads=num_heads,
        num_kv_heads=num_heads,
        head_dim=model_dim // num_heads,
        mlp_dim=fields.get("n_inner", 4 * model_dim),
        kinds=(LayerKind(rope=None),),
        num_positions=fields.need("n_positions"),
        tie_embeddings=fields.get("tie_word_embeddings", True),
        norm_eps=fields.get("layer_norm_epsilon", 1e-5),
        layer_norm=True,
        qkv_bias=True,
        out_bias=True,
        gated=False,
        activation=fields.choose("activation_function", ACTIVATIONS, "gelu_new"),
        mlp_bias=True,
    )


def gpt_neox(fields: Fields) -> TransformerConfig:
    """GPT-NeoX and Pythia: parallel residual, part of each head turns (Black et al. 2022)."""
    bias = fields.get("attention_bias", True)
    base, fraction = fields.get("rotary_emb_base", 10_000.0), fields.get("rotary_pct", 0.25)
    shape = _llama_like(
        fields,
        norm_eps=fields.get("layer_norm_eps", 1e-5),
        activation=fields.choose("hidden_act", ACTIVATIONS, "gelu"),
        qkv_bias=bias,
        out_bias=bias,
        layer_norm=True,
        parallel=fields.get("use_parallel_residual", True),
        gated=False,
        mlp_bias=True,
    )
    return TransformerConfig(**shape, kinds=(LayerKind(read_rope(fields, base=base, fraction=fraction)),))

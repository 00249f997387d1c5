"""The published families, each by two tables: what its config says about our network, and where its tensors go.

To add one: write a function from its `config.json` to `TransformerConfig` in `models.hf_configs`, a tuple of `Entry` and a
row in `FAMILIES` here, and a row in `tests/models/test_families.py`, which compares logits with the torch model. Nothing
else knows a family.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from rlhf_jax.models import hf_configs, layouts
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.hf_configs import Fields
from rlhf_jax.models.layouts import Layout


class Entry(NamedTuple):
    """One tensor of the checkpoint. `{layer}` and `{expert}` stand for indices; entries of absent arrays are skipped."""

    theirs: str
    ours: tuple[str, ...]
    """Arrays of `params`, those of `params["layers"]` where the name has a layer."""
    layout: Layout = layouts.same


class Family(NamedTuple):
    """One architecture."""

    config: Callable[[Fields], TransformerConfig]
    entries: tuple[Entry, ...]
    causal: str
    """Class name in transformers of the language model."""
    scoring: str
    """And of the reward model."""
    buffers: tuple[str, ...] = ()
    """Ends of names that old checkpoints hold and that are no parameters."""
    prefix: str = "model."
    """What names start with, but for files of the bare network, which leave it away."""


LAYER = "model.layers.{layer}."
EMBEDDINGS = (
    Entry("model.embed_tokens.weight", ("embedding",)),
    Entry("model.norm.weight", ("final_norm",)),
    Entry("lm_head.weight", ("unembedding",)),
)
OUT = (
    Entry(LAYER + "self_attn.o_proj.weight", ("out",), layouts.linear(2)),
    Entry(LAYER + "self_attn.o_proj.bias", ("out_bias",)),
)
ATTENTION = (
    *(
        Entry(f"{LAYER}self_attn.{short}_proj.{end}", (name + suffix,), layouts.linear(num_inputs))
        for short, name in (("q", "query"), ("k", "key"), ("v", "value"))
        for end, suffix, num_inputs in (("weight", "", 1), ("bias", "_bias", 0))
    ),
    Entry(LAYER + "self_attn.q_norm.weight", ("query_norm",), layouts.linear(0)),
    Entry(LAYER + "self_attn.k_norm.weight", ("key_norm",), layouts.linear(0)),
    *OUT,
)
MLP = tuple(
    Entry(f"{LAYER}mlp.{name}_proj.{end}", (name + suffix,), layouts.linear(num_inputs))
    for name in ("gate", "up", "down")
    for end, suffix, num_inputs in (("weight", "", 1), ("bias", "_bias", 0))
)
PRE_NORMS = (
    Entry(LAYER + "input_layernorm.weight", ("attention_norm",)),
    Entry(LAYER + "post_attention_layernorm.weight", ("mlp_norm",)),
)
POST_NORMS = (
    Entry(LAYER + "input_layernorm.weight", ("attention_norm",)),
    Entry(LAYER + "post_attention_layernorm.weight", ("attention_post_norm",)),
    Entry(LAYER + "pre_feedforward_layernorm.weight", ("mlp_norm",)),
    Entry(LAYER + "post_feedforward_layernorm.weight", ("mlp_post_norm",)),
)


def _experts(block: str, router: str, gate: str, up: str, down: str) -> tuple[Entry, ...]:
    names = {"gate": gate, "up": up, "down": down}
    return (
        Entry(f"{LAYER}{block}.{router}.weight", ("router",), layouts.linear()),
        *(Entry(f"{LAYER}{block}.experts.{{expert}}.{n}.weight", (k,), layouts.linear()) for k, n in names.items()),
    )


LLAMA = (*EMBEDDINGS, *ATTENTION, *MLP, *PRE_NORMS)
POST_NORMED = (*EMBEDDINGS, *ATTENTION, *MLP, *POST_NORMS)
MIXTRAL = (*EMBEDDINGS, *ATTENTION, *PRE_NORMS, *_experts("block_sparse_moe", "gate", "w1", "w3", "w2"))
QWEN_MOE = (*EMBEDDINGS, *ATTENTION, *PRE_NORMS, *_experts("mlp", "gate", "gate_proj", "up_proj", "down_proj"))
PHI3 = (
    *EMBEDDINGS,
    *PRE_NORMS,
    *OUT,
    Entry(LAYER + "self_attn.qkv_proj.weight", ("query", "key", "value"), layouts.linear()),
    Entry(LAYER + "mlp.gate_up_proj.weight", ("gate", "up"), layouts.linear()),
    Entry(LAYER + "mlp.down_proj.weight", ("down",), layouts.linear()),
)


def _with_bias(theirs: str, ours: str) -> tuple[Entry, Entry]:
    return Entry(f"{theirs}.weight", (ours,)), Entry(f"{theirs}.bias", (f"{ours}_bias",))


H = "transformer.h.{layer}."
QKV, QKV_BIAS = ("query", "key", "value"), ("query_bias", "key_bias", "value_bias")
GPT2 = (
    Entry("transformer.wte.weight", ("embedding",)),
    Entry("transformer.wpe.weight", ("positions",)),
    Entry("lm_head.weight", ("unembedding",)),
    *_with_bias("transformer.ln_f", "final_norm"),
    *_with_bias(H + "ln_1", "attention_norm"),
    *_with_bias(H + "ln_2", "mlp_norm"),
    Entry(H + "attn.c_attn.weight", QKV, layouts.conv1d()),
    Entry(H + "attn.c_attn.bias", QKV_BIAS, layouts.linear(0)),
    Entry(H + "attn.c_proj.weight", ("out",), layouts.conv1d(2)),
    Entry(H + "attn.c_proj.bias", ("out_bias",)),
    Entry(H + "mlp.c_fc.weight", ("up",), layouts.conv1d()),
    Entry(H + "mlp.c_fc.bias", ("up_bias",)),
    Entry(H + "mlp.c_proj.weight", ("down",), layouts.conv1d()),
    Entry(H + "mlp.c_proj.bias", ("down_bias",)),
)
X = "gpt_neox.layers.{layer}."
GPT_NEOX = (
    Entry("gpt_neox.embed_in.weight", ("embedding",)),
    Entry("embed_out.weight", ("unembedding",)),
    *_with_bias("gpt_neox.final_layer_norm", "final_norm"),
    *_with_bias(X + "input_layernorm", "attention_norm"),
    *_with_bias(X + "post_attention_layernorm", "mlp_norm"),
    Entry(X + "attention.query_key_value.weight", QKV, layouts.per_head),
    Entry(X + "attention.query_key_value.bias", QKV_BIAS, layouts.per_head),
    Entry(X + "attention.dense.weight", ("out",), layouts.linear(2)),
    Entry(X + "attention.dense.bias", ("out_bias",)),
    Entry(X + "mlp.dense_h_to_4h.weight", ("up",), layouts.linear()),
    Entry(X + "mlp.dense_h_to_4h.bias", ("up_bias",)),
    Entry(X + "mlp.dense_4h_to_h.weight", ("down",), layouts.linear()),
    Entry(X + "mlp.dense_4h_to_h.bias", ("down_bias",)),
)


def _family(config: Callable, entries: tuple[Entry, ...], name: str, **options) -> Family:
    return Family(config, entries, f"{name}ForCausalLM", f"{name}ForSequenceClassification", **options)


_rotary = partial(_family, buffers=("rotary_emb.inv_freq",))
FAMILIES: dict[str, Family] = {
    "llama": _rotary(hf_configs.llama, LLAMA, "Llama"),
    "mistral": _rotary(hf_configs.mistral, LLAMA, "Mistral"),
    "qwen2": _rotary(hf_configs.qwen2, LLAMA, "Qwen2"),
    "qwen3": _rotary(hf_configs.qwen3, LLAMA, "Qwen3"),
    "qwen3_moe": _rotary(hf_configs.qwen3_moe, QWEN_MOE, "Qwen3Moe"),
    "mixtral": _rotary(hf_configs.mixtral, MIXTRAL, "Mixtral"),
    "phi3": _rotary(hf_configs.phi3, PHI3, "Phi3"),
    "olmo2": _rotary(hf_configs.olmo2, POST_NORMED, "Olmo2"),
    "gemma2": _rotary(hf_configs.gemma2, POST_NORMED, "Gemma2"),
    "gemma3_text": Family(hf_configs.gemma3, POST_NORMED, "Gemma3ForCausalLM", "Gemma3TextForSequenceClassification"),
    "gpt2": Family(
        hf_configs.gpt2,
        GPT2,
        "GPT2LMHeadModel",
        "GPT2ForSequenceClassification",
        ("attn.bias", "attn.masked_bias"),
        "transformer.",
    ),
    "gpt_neox": _family(
        hf_configs.gpt_neox,
        GPT_NEOX,
        "GPTNeoX",
        buffers=("attention.bias", "attention.masked_bias", "rotary_emb.inv_freq"),
        prefix="gpt_neox.",
    ),
}
"""By `model_type` of `config.json`."""

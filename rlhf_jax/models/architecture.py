"""What a decoder-only network is, as data: its shape, its options, and every array that it has.

`transformer` runs it; `families` holds the values of the published ones.

Shapes: L layers, D width, H query heads, G key/value heads, C head width, F width of the MLP, E experts, V vocabulary.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import AttentionFn, xla_attention
from rlhf_jax.models.experts import ExpertsFn, routed_mlp
from rlhf_jax.models.parameters import ConstrainFn, ParamSpec, Specs, unconstrained
from rlhf_jax.models.products import ProductFn
from rlhf_jax.models.rope import DynamicNTK, LongRope, Rope

PLAIN_ROPE = Rope()


@dataclasses.dataclass(frozen=True)
class LayerKind:
    """In what the layers of one network may differ."""

    rope: Rope | None = PLAIN_ROPE
    window: int | None = None
    """Tokens that a query sees, itself included; None sees all before it."""


PLAIN_LAYER = LayerKind()


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerConfig:
    """The shape of the network. Hashable, so it can be a static argument of `jit`."""

    vocab_size: int
    num_layers: int = 2
    model_dim: int = 96
    num_heads: int = 4
    num_kv_heads: int = 4
    head_dim: int = 24
    mlp_dim: int = 256
    kinds: tuple[LayerKind, ...] = (PLAIN_LAYER,)
    """The different kinds of layers; their ropes turn equally many dimensions."""
    layer_kinds: tuple[int, ...] = ()
    """Index into `kinds` of every layer; empty: all are of the first kind."""
    num_positions: int = 0
    """Learned positions added to the embedding; 0 = none."""
    tie_embeddings: bool = True
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    norm_eps: float = 1e-6
    norm_offset: float = 0.0
    """Added to every RMSNorm scale: 1 where the stored ones are differences from 1 (Gemma)."""
    layer_norm: bool = False
    """LayerNorm with biases (Ba et al. 2016) instead of RMSNorm (Zhang & Sennrich 2019)."""
    pre_norm: bool = True
    post_norm: bool = False
    """Norms of what attention and MLP add to the residual stream."""
    parallel: bool = False
    """Attention and MLP both read the block's input (GPT-NeoX)."""

    query_scale: float | None = None
    """Factor on query · key; None is `head_dim^-0.5`."""
    attention_softcap: float | None = None
    """Logits go through `softcap * tanh(logits / softcap)` (Gemma 2)."""
    qk_norm: bool = False
    """RMSNorm of queries and keys, one scale for all heads (Qwen3, Gemma 3)."""
    qk_norm_across_heads: bool = False
    """The norm goes over all heads together, before they are split (OLMo 2)."""
    qkv_bias: bool = False
    out_bias: bool = False

    gated: bool = True
    """`down(activation(gate x) * up x)` (Shazeer 2020), else `down(activation(up x))`."""
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu
    mlp_bias: bool = False
    num_experts: int = 0
    """Gated MLPs per layer of which a router picks `experts_per_token`; 0 = one MLP, no router."""
    experts_per_token: int = 2
    renormalize_experts: bool = True

    dtype: str = "float32"
    """Compute dtype of the matrix products and of what flows between them; parameters are rounded to it where they are
    used, so that float32 ones are master weights. Norms, biases, rotations, softmax, router and logits are float32
    whatever it is."""
    attention_fn: AttentionFn = xla_attention
    """The implementation of attention; see `models.attention`."""
    experts_fn: ExpertsFn = routed_mlp
    """How tokens reach their experts; see `models.experts`."""
    product_fn: ProductFn = jnp.einsum
    """Products with weights; see `models.products`."""
    constrain_fn: ConstrainFn = unconstrained
    """Where activations live, said from outside: `runtime.sharding.constrain_on(mesh)`."""
    remat_policy: Callable | None = None
    """With `remat`: what of a layer is kept, one of `jax.checkpoint_policies`; None keeps nothing."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""
    logits_chunk: int | None = None
    """Tokens whose logits a loss makes at a time, None = all (see `CausalModel`). Worth it for large vocabularies."""
    unroll: int = 1
    """Layers per step of the loop over layers; more is faster while they are few and small, and slower to compile."""
    layers_apart: int = 16
    """Networks of up to so many layers run without a loop over them where there is a cache, which then is one array a
    layer. A sampler cuts the weights out of their stack once, a second copy of them (see `generation.hoisting`), where the
    loop would copy weights and cache of a layer for every token. Deeper ones compile faster in the loop."""

    last_layer_where_read: bool = False
    """What only some columns are read of (a reward model's last token, a prompt's last before sampling, completions) is
    computed in the last layer for these alone: keys and values of all, but queries, attention, MLP and norm of few. Same
    numbers to rounding. Where layers run in a loop (`unroll`, `layers_apart`) the last is not apart, and nothing is saved."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        sizes = {kind.rope.rotary_dim(self.head_dim) for kind in self.kinds if kind.rope is not None}
        if len(sizes) > 1 or any(size % 2 for size in sizes):
            raise ValueError(
                f"rotary dimensions {sorted(sizes)}: pairs turn, so one even number for all layers is needed"
            )
        if sizes and any(kind.rope is None for kind in self.kinds):
            raise ValueError("either all kinds of layers have rotary positions or none has")
        if self.layer_kinds and len(self.layer_kinds) != self.num_layers:
            raise ValueError(f"layer_kinds has {len(self.layer_kinds)} entries for {self.num_layers} layers")
        if self.num_experts and (self.mlp_bias or not self.gated):
            raise ValueError("experts are gated MLPs without biases")


def for_length(config: TransformerConfig, length: int) -> TransformerConfig:
    """The same network for texts of up to `length` tokens, where its rotary positions depend on that (see `rope`)."""

    def at_length(kind: LayerKind) -> LayerKind:
        if kind.rope is None or not isinstance(kind.rope.scaling, DynamicNTK | LongRope):
            return kind
        scaling = dataclasses.replace(kind.rope.scaling, length=length)
        return dataclasses.replace(kind, rope=dataclasses.replace(kind.rope, scaling=scaling))

    return dataclasses.replace(config, kinds=tuple(map(at_length, config.kinds)))


def param_specs(config: TransformerConfig) -> Specs:
    """Every array of the model with its shape, logical axes and initialiser.

    Matrices start as N(0, 1/fan_in) (LeCun et al. 1998), which suits widths from tens to thousands alike; those that
    write into the residual stream are divided by sqrt(2 L) (GPT-2, Radford et al. 2019, §2.3), so that its variance
    does not grow with depth. The embedding, which may also be the output matrix, is N(0, 1/D).
    """
    c, std = config, config.model_dim**-0.5
    layers = {
        name: ParamSpec((c.num_layers, *spec.shape), ("layers", *spec.axes), spec.stddev)
        for name, spec in {**_attention_specs(c), **_mlp_specs(c)}.items()
    }
    specs = {"embedding": ParamSpec((c.vocab_size, c.model_dim), ("vocab", "embed"), std), "layers": layers}
    if c.num_positions:
        specs["positions"] = ParamSpec((c.num_positions, c.model_dim), (None, "embed"), std)
    specs.update(_norm_specs(c, "final_norm"))
    if not c.tie_embeddings:
        specs["unembedding"] = ParamSpec((c.vocab_size, c.model_dim), ("vocab", "embed"), std)
    return specs


def _norm_specs(c: TransformerConfig, name: str, dim: int = 0, axis: str = "embed") -> dict[str, ParamSpec]:
    shape = (dim or c.model_dim,)
    specs = {name: ParamSpec(shape, (axis,), 0.0 if c.norm_offset else None)}
    if c.layer_norm:
        specs[f"{name}_bias"] = ParamSpec(shape, (axis,), 0.0)
    return specs


def _attention_specs(c: TransformerConfig) -> dict[str, ParamSpec]:
    std, depth = c.model_dim**-0.5, (2 * c.num_layers) ** 0.5
    out_std = (c.num_heads * c.head_dim) ** -0.5 / depth
    heads = {
        "query": (c.num_heads, "heads"),
        "key": (c.num_kv_heads, "kv_heads"),
        "value": (c.num_kv_heads, "kv_heads"),
    }
    specs = {}
    for name, (count, axis) in heads.items():
        specs[name] = ParamSpec((c.model_dim, count, c.head_dim), ("embed", axis, "head_dim"), std)
        if c.qkv_bias:
            specs[f"{name}_bias"] = ParamSpec((count, c.head_dim), (axis, "head_dim"), 0.0)
        if c.qk_norm and name != "value":
            shape, axes = (
                ((count, c.head_dim), (axis, "head_dim")) if c.qk_norm_across_heads else ((c.head_dim,), (None,))
            )
            specs[f"{name}_norm"] = ParamSpec(shape, axes, 0.0 if c.norm_offset else None)
    specs["out"] = ParamSpec((c.num_heads, c.head_dim, c.model_dim), ("heads", "head_dim", "embed"), out_std)
    if c.out_bias:
        specs["out_bias"] = ParamSpec((c.model_dim,), ("embed",), 0.0)
    return {**specs, **_block_norm_specs(c, "attention")}


def _mlp_specs(c: TransformerConfig) -> dict[str, ParamSpec]:
    std, depth = c.model_dim**-0.5, (2 * c.num_layers) ** 0.5
    experts, axis = ((c.num_experts,), ("expert",)) if c.num_experts else ((), ())
    specs = {"router": ParamSpec((c.model_dim, c.num_experts), ("embed", "expert"), std)} if c.num_experts else {}
    for name in ("gate", "up") if c.gated else ("up",):
        specs[name] = ParamSpec((*experts, c.model_dim, c.mlp_dim), (*axis, "embed", "mlp"), std)
        if c.mlp_bias:
            specs[f"{name}_bias"] = ParamSpec((c.mlp_dim,), ("mlp",), 0.0)
    specs["down"] = ParamSpec((*experts, c.mlp_dim, c.model_dim), (*axis, "mlp", "embed"), c.mlp_dim**-0.5 / depth)
    if c.mlp_bias:
        specs["down_bias"] = ParamSpec((c.model_dim,), ("embed",), 0.0)
    return {**specs, **_block_norm_specs(c, "mlp")}


def _block_norm_specs(c: TransformerConfig, part: str) -> dict[str, ParamSpec]:
    before = _norm_specs(c, f"{part}_norm") if c.pre_norm else {}
    return {**before, **(_norm_specs(c, f"{part}_post_norm") if c.post_norm else {})}

"""A decoder-only transformer as functions, described by data: `init`, `hidden`, `unembed`, `init_cache`.

One network for the published families (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, GPT-NeoX, OLMo 2, Mixtral):
`TransformerConfig` says which norms, positions, biases, windows and experts it has; `models.families` holds the values.
Layers are stacked on a leading axis and run under `lax.scan`, or with a cache, where they are few, one after the other; the
same `hidden` serves training, prefill and decoding.

Shapes: B rows, T new tokens, S cached tokens, L layers, D width, H query heads, G key/value heads, C head width,
F width of the MLP, E experts, V vocabulary.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.models.attention import AttentionFn, forked_attention, sights, xla_attention
from rlhf_jax.models.experts import ExpertsFn, routed_mlp
from rlhf_jax.models.kv_cache import KVCache, empty_cache, fork_cache, refill_cache, store
from rlhf_jax.models.norms import layer_norm, rms_norm
from rlhf_jax.models.parameters import ConstrainFn, ParamSpec, Specs, init_params, unconstrained
from rlhf_jax.models.products import ProductFn, gradient_rounded
from rlhf_jax.models.rope import DynamicNTK, LongRope, Rope, rotate, rotation
from rlhf_jax.types import CausalModel, Params

PLAIN_ROPE = Rope()

STREAM = ("batch", "length", None)
"""Logical axes of what flows from layer to layer, `[B, T, D]`."""
LOOKUP = ("lookup", "length", "embed")  # of rows of the embedding where they are found, before they move to `STREAM`
VOCABULARY = ("vocab", None)
"""Of the output matrix where it is used: whole rows."""


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


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Fresh parameters, float32."""
    return init_params(key, param_specs(config))


def init_cache(config: TransformerConfig, batch_size: int, max_length: int) -> KVCache:
    """An empty cache with room for `max_length` tokens a row."""
    shape = (batch_size, config.num_kv_heads, max_length, config.head_dim)
    apart = config.num_layers <= config.layers_apart
    return empty_cache(shape, config.num_layers, config.dtype, config.constrain_fn, apart=apart)


def hidden(
    params: Params,
    config: TransformerConfig,
    tokens: jax.Array,
    positions: jax.Array,
    segment_ids: jax.Array,
    cache: KVCache | None = None,
) -> tuple[jax.Array, KVCache | None]:
    """Final hidden states, the last norm applied.

    Args:
      params: from `init`, or loaded; matrices may be `lora.LowRank` or `quantize.Quantized`.
      config: the same that `init` got.
      tokens: `[B, T]`, ids below `vocab_size` (checked on the host, see `data.batching.check_token_ids`).
      positions: `[B, T]`, the place of each token inside its own sequence.
      segment_ids: `[B, T]`, 0 = padding. A token sees the tokens before it that share its id.
      cache: None, or a cache with at least T free columns (one token may also take the oldest column's place). The new
        tokens follow the ones it holds.

    Returns:
      `[B, T, D]` float32 and the cache with the T tokens appended (None if none was given).
    """
    if positions.shape != tokens.shape or segment_ids.shape != tokens.shape:
        raise ValueError(
            f"tokens {tokens.shape}, positions {positions.shape} and segment_ids {segment_ids.shape} must agree"
        )
    start, key_segments, windows = jnp.zeros((), jnp.int32), segment_ids, tuple(kind.window for kind in config.kinds)
    past, sight_of_past = None if cache is None else cache.past, None
    if cache is not None:
        start = cache.length % cache.segment_ids.shape[1]
        key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, start))
    if past is not None:
        past_segments = jnp.repeat(past.segment_ids, segment_ids.shape[0] // past.segment_ids.shape[0], axis=0)
        sight_of_past = sights(segment_ids, past_segments, past.length + cache.length, windows)
    sight = sights(segment_ids, key_segments, start, windows)
    turn = _rotation_by_kind(config, positions)

    def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
        x, keys, values = carry
        weights, index, kind, past = scanned
        inputs = (turn(kind), sight(kind), None if past is None else (*past, sight_of_past(kind)))
        x, keys, values = _block(weights, config, x, inputs, keys, values, (index, start))
        x = config.constrain_fn(x, STREAM)
        return (x, keys, values), None

    if config.remat and cache is None:
        layer = jax.checkpoint(layer, policy=config.remat_policy)
    carry = (
        config.constrain_fn(_embed(params, config, tokens, positions), STREAM),
        *((None, None) if cache is None else (cache.keys, cache.values)),
    )
    kinds = config.layer_kinds or (0,) * config.num_layers
    shared = None if past is None else (past.keys, past.values)
    if cache is not None and isinstance(cache.keys, tuple):
        for index in range(config.num_layers):
            weights = jax.tree.map(lambda stacked, index=index: stacked[index], params["layers"])
            own = None if shared is None else (shared[0][index], shared[1][index])
            (x, *caches), _ = layer(carry, (weights, index, kinds[index], own))
            carry = (jax.lax.optimization_barrier(x), *caches)  # rounded here, as by the loop, in every dtype
    else:
        scanned = (params["layers"], jnp.arange(config.num_layers), jnp.asarray(kinds, jnp.int32), shared)
        carry, _ = jax.lax.scan(layer, carry, scanned, unroll=config.unroll)
    x, keys, values = carry
    x = _norm(config, params, "final_norm", x.astype(jnp.float32))
    return x, None if cache is None else KVCache(keys, values, key_segments, cache.length + tokens.shape[1], past)


def unembed(params: Params, config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
    matrix = params["embedding" if config.tie_embeddings else "unembedding"].astype(config.dtype)
    matrix = config.constrain_fn(matrix, VOCABULARY)  # what travels is rounded first
    rows = "bt"[: hidden.ndim - 1]
    equation, states = f"{rows}d,vd->{rows}v", hidden.astype(config.dtype)
    if jnp.dtype(config.dtype).itemsize == 2:
        logits = gradient_rounded(config.product_fn, equation, states, matrix)
    else:
        logits = config.product_fn(equation, states, matrix, preferred_element_type=jnp.float32)
    return logits if config.logit_softcap is None else config.logit_softcap * jnp.tanh(logits / config.logit_softcap)


def causal_model(config: TransformerConfig) -> CausalModel:
    """The three functions that the floors above ask of a model, bound to `config`."""

    def bound_hidden(params, tokens, positions, segment_ids, cache=None):
        return hidden(params, config, tokens, positions, segment_ids, cache)

    return CausalModel(
        hidden=bound_hidden,
        unembed=lambda params, states: unembed(params, config, states),
        init_cache=partial(init_cache, config),
        logits_chunk=config.logits_chunk,
        fork_cache=fork_cache,
        refill_cache=refill_cache,
    )


def _norm(config: TransformerConfig, weights: Params, name: str, x: jax.Array) -> jax.Array:
    if config.layer_norm:
        return layer_norm(x, weights[name], weights[f"{name}_bias"], config.norm_eps)
    return rms_norm(x, weights[name].astype(jnp.float32) + config.norm_offset, config.norm_eps)


def _embed(params: Params, config: TransformerConfig, tokens: jax.Array, positions: jax.Array) -> jax.Array:
    x = config.constrain_fn(params["embedding"][tokens].astype(config.dtype), LOOKUP)
    if config.embedding_scale != 1.0:
        x = x * jnp.asarray(config.embedding_scale, config.dtype)
    if config.num_positions:
        x = x + params["positions"][positions].astype(config.dtype)
    return x


def _rotation_by_kind(config: TransformerConfig, positions: jax.Array):
    """A function from a layer's kind to its rotation, or None."""
    ropes = [kind.rope for kind in config.kinds if kind.rope is not None]
    rotations = (
        jax.tree.map(lambda *parts: jnp.stack(parts), *[rotation(positions, rope, config.head_dim) for rope in ropes])
        if ropes
        else None
    )
    return lambda kind: jax.tree.map(lambda x: x[kind], rotations)


def _block(weights, config, x, layer_inputs, keys, values, at):
    """One layer; `keys`/`values` are the caches of all layers or None, `at` the layer and the column to write to."""
    exact = {name for name in weights if "norm" in name or name == "router" or name.endswith("_bias")}
    weights = {name: x.astype(jnp.float32 if name in exact else config.dtype) for name, x in weights.items()}
    h = _norm(config, weights, "attention_norm", x) if config.pre_norm else x
    update, keys, values = _attention(weights, config, h, layer_inputs, keys, values, at)
    update = _norm(config, weights, "attention_post_norm", update) if config.post_norm else update
    after = x + update
    source = x if config.parallel else after
    h = _norm(config, weights, "mlp_norm", source) if config.pre_norm else source
    update = _mlp(weights, config, h)
    return after + (_norm(config, weights, "mlp_post_norm", update) if config.post_norm else update), keys, values


def _product(config: TransformerConfig, equation: str, x: jax.Array, weight) -> jax.Array:
    """With a weight; one that is still no array after `astype` has its own product (`lora.LowRank`)."""
    return config.product_fn(equation, x, weight) if isinstance(weight, jax.Array) else weight.product(equation, x)


def _add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """In float32 and rounded once, so that the bias's gradient, a sum over all tokens, is float32, too."""
    return (x.astype(jnp.float32) + bias[None, None]).astype(x.dtype)


def _attention(weights, config, h, layer_inputs, keys, values, at):
    turn, sight, past = layer_inputs

    def heads(name: str) -> jax.Array:
        projected = _product(config, "btd,dnc->btnc", h, weights[name])
        if config.qkv_bias:
            projected = _add_bias(projected, weights[f"{name}_bias"])
        if config.qk_norm and name != "value":
            scale = weights[f"{name}_norm"] + config.norm_offset
            projected = rms_norm(projected, scale, config.norm_eps)
        return projected if turn is None or name == "value" else rotate(projected, *turn)

    query, key, value = heads("query"), heads("key"), heads("value")
    if keys is not None:
        keys, key = store(keys, key, *at)
        values, value = store(values, value, *at)
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    options = {"scale": scale, "softcap": config.attention_softcap}
    if past is None:
        attended = config.attention_fn(query, key, value, sight, **options)
    else:
        *shared, sight_of_past = past
        shared = [jnp.swapaxes(x, 1, 2) for x in shared]
        attended = forked_attention(query, (*shared, sight_of_past), (key, value, sight), **options)
    update = _product(config, "btnc,ncd->btd", attended, weights["out"])
    return _add_bias(update, weights["out_bias"]) if config.out_bias else update, keys, values


def _mlp(weights, config, h):
    if config.num_experts:
        options = {"experts_per_token": config.experts_per_token, "renormalize": config.renormalize_experts}
        matrices = (weights["router"], weights["gate"], weights["up"], weights["down"])
        return config.experts_fn(h, *matrices, **options, activation=config.activation)

    def dense(name: str, x: jax.Array) -> jax.Array:
        product = _product(config, "btd,df->btf", x, weights[name])
        return _add_bias(product, weights[f"{name}_bias"]) if config.mlp_bias else product

    inner = config.activation(dense("gate", h)) * dense("up", h) if config.gated else config.activation(dense("up", h))
    return dense("down", inner)

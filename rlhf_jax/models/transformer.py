"""A decoder-only transformer as functions, described by data: `init`, `hidden`, `unembed`, `init_cache`.

One network for the published families (Llama, Mistral, Qwen, Gemma, Phi-3, GPT-2, GPT-NeoX, OLMo 2, Mixtral):
`architecture.TransformerConfig` says which norms, positions, biases, windows and experts it has.
Layers are stacked on a leading axis and run under `lax.scan`, or with a cache, where they are few, one after the other; the
same `hidden` serves training, prefill and decoding.

Shapes: B rows, T new tokens, S cached tokens, L layers, D width, H query heads, G key/value heads, C head width,
F width of the MLP, E experts, V vocabulary.
"""

from functools import partial

import jax
import jax.numpy as jnp

from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.attention import forked_attention, sights
from rlhf_jax.models.kv_cache import KVCache, empty_cache, fork_cache, refill_cache, store
from rlhf_jax.models.norms import layer_norm, rms_norm
from rlhf_jax.models.parameters import init_params
from rlhf_jax.models.products import gradient_rounded
from rlhf_jax.models.rope import rotate, rotation
from rlhf_jax.types import CausalModel, Params, PickFn

STREAM = ("batch", "length", None)
"""Logical axes of what flows from layer to layer, `[B, T, D]`."""
LOOKUP = ("lookup", "length", "embed")  # of rows of the embedding where they are found, before they move to `STREAM`
VOCABULARY = ("vocab", None)
"""Of the output matrix where it is used: whole rows."""


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
    pick: PickFn | None = None,
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
      pick: None, or the columns whose states are wanted; where the last layer is no part of a loop it computes no others.

    Returns:
      `[B, T, D]` float32, `[B, R, D]` of R picked columns, and the cache with the T tokens appended (None if none was given).
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

    def layer(carry: tuple, scanned: tuple, pick: PickFn | None = None) -> tuple[tuple, None]:
        x, keys, values = carry
        weights, index, kind, past = scanned
        inputs = (turn(kind), sight(kind), None if past is None else (*past, sight_of_past(kind)))
        x, keys, values = _block(weights, config, x, inputs, keys, values, (index, start), pick)
        x = config.constrain_fn(x, STREAM)
        return (x, keys, values), None

    apart = cache is not None and isinstance(cache.keys, tuple)
    narrow = pick is not None and (apart or (cache is None and config.unroll >= config.num_layers))
    last = partial(layer, pick=pick) if narrow else layer
    if config.remat and cache is None:
        layer, last = (jax.checkpoint(run, policy=config.remat_policy) for run in (layer, last))
    carry = (
        config.constrain_fn(_embed(params, config, tokens, positions), STREAM),
        *((None, None) if cache is None else (cache.keys, cache.values)),
    )
    shared = None if past is None else (past.keys, past.values)
    if apart:
        x, keys, values = _layers_apart(config, layer, last, carry, params["layers"], shared)
    elif narrow:
        x, keys, values = _last_apart(config, layer, last, carry, _stacked(config, params, shared))
    else:
        (x, keys, values), _ = jax.lax.scan(layer, carry, _stacked(config, params, shared), unroll=config.unroll)
    x = x if pick is None or narrow else pick(x)
    x = _norm(config, params, "final_norm", x.astype(jnp.float32))
    return x, None if cache is None else KVCache(keys, values, key_segments, cache.length + tokens.shape[1], past)


def _kinds(config: TransformerConfig) -> tuple[int, ...]:
    return config.layer_kinds or (0,) * config.num_layers


def _stacked(config: TransformerConfig, params: Params, shared: tuple | None) -> tuple:
    """What a loop over the layers goes through: weights, index, kind and past of each."""
    return params["layers"], jnp.arange(config.num_layers), jnp.asarray(_kinds(config), jnp.int32), shared


def _layers_apart(config: TransformerConfig, layer, last, carry: tuple, layers: Params, shared: tuple | None) -> tuple:
    """One after the other, each with an array of its own in the cache; the last one by `last`."""
    for index, kind in enumerate(_kinds(config)):
        weights = jax.tree.map(lambda stacked, index=index: stacked[index], layers)
        own = None if shared is None else (shared[0][index], shared[1][index])
        run = last if index == config.num_layers - 1 else layer
        (x, *caches), _ = run(carry, (weights, index, kind, own))
        carry = (jax.lax.optimization_barrier(x), *caches)  # rounded here, as by the loop, in every dtype
    return carry


def _last_apart(config: TransformerConfig, layer, last, carry: tuple, stacked: tuple) -> tuple:
    """All but the last in a loop, unrolled, then the last one by `last`. The gradient of a split is one concatenation."""
    leaves, tree = jax.tree.flatten(stacked)
    before, final = zip(*(jnp.split(x, [config.num_layers - 1]) for x in leaves), strict=True)
    unroll = max(1, config.num_layers - 1)
    carry, _ = jax.lax.scan(layer, carry, jax.tree.unflatten(tree, before), unroll=unroll)
    return last(carry, jax.tree.unflatten(tree, [x[0] for x in final]))[0]


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
    """What the floors above ask of a model, bound to `config`."""

    def bound_hidden(params, tokens, positions, segment_ids, cache=None, pick=None):
        return hidden(params, config, tokens, positions, segment_ids, cache, pick)

    return CausalModel(
        hidden=bound_hidden,
        unembed=lambda params, states: unembed(params, config, states),
        init_cache=partial(init_cache, config),
        logits_chunk=config.logits_chunk,
        fork_cache=fork_cache,
        refill_cache=refill_cache,
        hidden_at=bound_hidden if config.last_layer_where_read else None,
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
    # Without the barrier XLA fuses cosine and sine into every layer's queries and keys, once a head.
    rotations = jax.lax.optimization_barrier(rotations)
    return lambda kind: jax.tree.map(lambda x: x[kind], rotations)


def _block(weights, config, x, layer_inputs, keys, values, at, pick):
    """One layer; `keys`/`values` are the caches of all layers or None, `at` the layer and the column to write to.

    With `pick` all columns have keys and values, and the picked ones all else.
    """
    exact = {name for name in weights if "norm" in name or name == "router" or name.endswith("_bias")}
    weights = {name: x.astype(jnp.float32 if name in exact else config.dtype) for name, x in weights.items()}
    h = _norm(config, weights, "attention_norm", x) if config.pre_norm else x
    update, keys, values = _attention(weights, config, h, layer_inputs, keys, values, at, pick)
    x = x if pick is None else pick(x)
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


def _attention(weights, config, h, layer_inputs, keys, values, at, pick):
    turn, sight, past = layer_inputs

    def heads(name: str, h: jax.Array, turn: tuple | None) -> jax.Array:
        projected = _product(config, "btd,dnc->btnc", h, weights[name])
        if config.qkv_bias:
            projected = _add_bias(projected, weights[f"{name}_bias"])
        if config.qk_norm and name != "value":
            scale = weights[f"{name}_norm"] + config.norm_offset
            projected = rms_norm(projected, scale, config.norm_eps)
        return projected if turn is None or name == "value" else rotate(projected, *turn)

    asking = (h, turn) if pick is None else jax.tree.map(pick, (h, turn))
    query, key, value = heads("query", *asking), heads("key", h, turn), heads("value", h, turn)
    if keys is not None:
        keys, key = store(keys, key, *at)
        values, value = store(values, value, *at)
    scale = config.head_dim**-0.5 if config.query_scale is None else config.query_scale
    options = {"scale": scale, "softcap": config.attention_softcap}
    sight = sight if pick is None else sight.of(pick)
    if past is None:
        attended = config.attention_fn(query, key, value, sight, **options)
    else:
        *shared, sight_of_past = past
        sight_of_past = sight_of_past if pick is None else sight_of_past.of(pick)
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

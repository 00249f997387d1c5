"""A decoder-only transformer as functions: `init`, `hidden`, `unembed`, `init_cache`.

Pre-norm blocks of RMSNorm (Zhang & Sennrich 2019), rotary positions (Su et al. 2021, half-split pairs as in the
Hugging Face checkpoints), grouped-query attention (Ainslie et al. 2023) and SwiGLU (Shazeer 2020). Layers are stacked
on a leading axis and run under `lax.scan`; the same `hidden` serves training, prefill and decoding.

Shapes: B rows, T new tokens, S cached tokens, L layers, D width, H query heads, G key/value heads, C head width,
F width of the MLP, V vocabulary.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.parameters import ParamSpec, Specs, init_params
from rlhf_jax.types import CausalModel, Params


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
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tie_embeddings: bool = True
    dtype: str = "float32"
    """Compute dtype of the matrix products. Norms, softmax and logits are float32 whatever it is."""
    remat: bool = False
    """Recompute each layer in the backward pass instead of storing its activations."""
    unroll: int = 1
    """Layers per step of the loop over layers; more is faster while they are few and small, and slower to compile."""

    def __post_init__(self) -> None:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} is odd: rotary positions turn pairs of dimensions")


@struct.dataclass
class KVCache:
    """Keys and values of the tokens seen so far. Every row is written at the same column."""

    keys: jax.Array  # [L, B, S, G, C]
    values: jax.Array  # [L, B, S, G, C]
    segment_ids: jax.Array  # [B, S], 0 where nothing (or padding) is stored
    length: jax.Array  # [], columns written


def param_specs(config: TransformerConfig) -> Specs:
    """Every array of the model with its shape, logical axes and initialiser.

    Matrices start as N(0, 1/fan_in) (LeCun et al. 1998), which suits widths from tens to thousands alike; those that
    write into the residual stream are divided by sqrt(2 L) (GPT-2, Radford et al. 2019, §2.3), so that its variance
    does not grow with depth. The embedding, which may also be the output matrix, is N(0, 1/D).
    """
    c = config
    depth = (2 * c.num_layers) ** 0.5

    def stacked(shape: tuple[int, ...], axes: tuple[str, ...], stddev: float | None) -> ParamSpec:
        return ParamSpec((c.num_layers, *shape), ("layers", *axes), stddev)

    std = c.model_dim**-0.5
    layers = {
        "attention_norm": stacked((c.model_dim,), ("embed",), None),
        "query": stacked((c.model_dim, c.num_heads, c.head_dim), ("embed", "heads", "head_dim"), std),
        "key": stacked((c.model_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), std),
        "value": stacked((c.model_dim, c.num_kv_heads, c.head_dim), ("embed", "kv_heads", "head_dim"), std),
        "out": stacked(
            (c.num_heads, c.head_dim, c.model_dim),
            ("heads", "head_dim", "embed"),
            (c.num_heads * c.head_dim) ** -0.5 / depth,
        ),
        "mlp_norm": stacked((c.model_dim,), ("embed",), None),
        "gate": stacked((c.model_dim, c.mlp_dim), ("embed", "mlp"), std),
        "up": stacked((c.model_dim, c.mlp_dim), ("embed", "mlp"), std),
        "down": stacked((c.mlp_dim, c.model_dim), ("mlp", "embed"), c.mlp_dim**-0.5 / depth),
    }
    specs = {
        "embedding": ParamSpec((c.vocab_size, c.model_dim), ("vocab", "embed"), std),
        "layers": layers,
        "final_norm": ParamSpec((c.model_dim,), ("embed",), None),
    }
    if not c.tie_embeddings:
        specs["unembedding"] = ParamSpec((c.vocab_size, c.model_dim), ("vocab", "embed"), std)
    return specs


def init(key: jax.Array, config: TransformerConfig) -> Params:
    """Fresh parameters, float32."""
    return init_params(key, param_specs(config))


def init_cache(config: TransformerConfig, batch_size: int, max_length: int) -> KVCache:
    """An empty cache with room for `max_length` tokens a row."""
    shape = (config.num_layers, batch_size, max_length, config.num_kv_heads, config.head_dim)
    return KVCache(
        keys=jnp.zeros(shape, config.dtype),
        values=jnp.zeros(shape, config.dtype),
        segment_ids=jnp.zeros((batch_size, max_length), jnp.int32),
        length=jnp.zeros((), jnp.int32),
    )


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
      params: from `init`.
      config: the same that `init` got.
      tokens: `[B, T]`, ids below `vocab_size` (checked on the host, see `data.batching.check_token_ids`).
      positions: `[B, T]`, the place of each token inside its own sequence.
      segment_ids: `[B, T]`, 0 = padding. A token sees the tokens before it that share its id.
      cache: None, or a cache with at least T free columns. The new tokens follow the ones it holds.

    Returns:
      `[B, T, D]` float32 and the cache with the T tokens appended (None if none was given).
    """
    if positions.shape != tokens.shape or segment_ids.shape != tokens.shape:
        raise ValueError(
            f"tokens {tokens.shape}, positions {positions.shape} and segment_ids {segment_ids.shape} must agree"
        )
    start = jnp.zeros((), jnp.int32) if cache is None else cache.length
    key_segments = segment_ids
    if cache is not None:
        key_segments = jax.lax.dynamic_update_slice(cache.segment_ids, segment_ids, (0, start))
    mask = _attention_mask(segment_ids, key_segments, start)
    rotation = _rotation(positions, config)

    def layer(carry: tuple, scanned: tuple) -> tuple[tuple, None]:
        x, keys, values = carry
        weights, index = scanned
        x, keys, values = _block(weights, config, x, rotation, mask, keys, values, index, start)
        return (x, keys, values), None

    if config.remat and cache is None:
        layer = jax.checkpoint(layer)
    x = params["embedding"][tokens].astype(config.dtype)
    carry = (x, None, None) if cache is None else (x, cache.keys, cache.values)
    scanned = (params["layers"], jnp.arange(config.num_layers))
    (x, keys, values), _ = jax.lax.scan(layer, carry, scanned, unroll=config.unroll)
    x = rms_norm(x.astype(jnp.float32), params["final_norm"], config.norm_eps)
    if cache is None:
        return x, None
    return x, KVCache(keys, values, key_segments, start + tokens.shape[1])


def unembed(params: Params, config: TransformerConfig, hidden: jax.Array) -> jax.Array:
    """Logits `[..., V]` in float32 of hidden states `[..., D]`."""
    matrix = params["embedding"] if config.tie_embeddings else params["unembedding"]
    return jnp.einsum(
        "...d,vd->...v", hidden.astype(config.dtype), matrix.astype(config.dtype), preferred_element_type=jnp.float32
    )


def causal_model(config: TransformerConfig) -> CausalModel:
    """The three functions that the floors above ask of a model, bound to `config`."""

    def bound_hidden(params, tokens, positions, segment_ids, cache=None):
        return hidden(params, config, tokens, positions, segment_ids, cache)

    return CausalModel(
        hidden=bound_hidden,
        unembed=lambda params, states: unembed(params, config, states),
        init_cache=partial(init_cache, config),
    )


def rms_norm(x: jax.Array, scale: jax.Array, eps: float) -> jax.Array:
    """`x / sqrt(mean(x²) + eps) * scale` over the last axis, computed in float32, returned in x's dtype."""
    x32 = x.astype(jnp.float32)
    normed = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (normed * jnp.expand_dims(scale, range(x.ndim - 1))).astype(x.dtype)


def rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turn the pairs (i, i + C/2) of `x [B, T, N, C]` by the angles of their positions."""
    cos, sin = rotation
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


def _rotation(positions: jax.Array, config: TransformerConfig) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, 1, C/2]` of `position * base^(-2i/C)`."""
    exponents = jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim
    frequencies = config.rope_base**-exponents
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def _attention_mask(query_segments: jax.Array, key_segments: jax.Array, start: jax.Array) -> jax.Array:
    """`[B, 1, T, S]`: the key is not after the query, of the same segment, and no padding."""
    query_columns = start + jnp.arange(query_segments.shape[1])
    causal = jnp.arange(key_segments.shape[1])[None, :] <= query_columns[:, None]
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments[:, None, :] > 0) & causal[None])[:, None]


def _block(weights, config, x, rotation, mask, keys, values, index, start):
    """One layer; `keys`/`values` are the stacked caches or None."""
    weights = {name: array if name.endswith("norm") else array.astype(config.dtype) for name, array in weights.items()}
    h = rms_norm(x, weights["attention_norm"], config.norm_eps)
    query = rotate(jnp.einsum("btd,dnc->btnc", h, weights["query"]), rotation)
    key = rotate(jnp.einsum("btd,dnc->btnc", h, weights["key"]), rotation)
    value = jnp.einsum("btd,dnc->btnc", h, weights["value"])
    if keys is not None:
        at = (index, 0, start, 0, 0)
        keys = jax.lax.dynamic_update_slice(keys, key[None], at)
        values = jax.lax.dynamic_update_slice(values, value[None], at)
        key = jax.lax.dynamic_index_in_dim(keys, index, keepdims=False)
        value = jax.lax.dynamic_index_in_dim(values, index, keepdims=False)
    attended = jax.nn.dot_product_attention(query, key, value, mask=mask)
    x = x + jnp.einsum("btnc,ncd->btd", attended, weights["out"])
    h = rms_norm(x, weights["mlp_norm"], config.norm_eps)
    gated = jax.nn.silu(jnp.einsum("btd,df->btf", h, weights["gate"])) * jnp.einsum("btd,df->btf", h, weights["up"])
    x = x + jnp.einsum("btf,fd->btd", gated, weights["down"])
    return x, keys, values

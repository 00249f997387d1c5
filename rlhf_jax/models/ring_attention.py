"""Attention over columns that are split: queries stay, blocks of keys and values go round a ring (Liu et al. 2023).

A device never has more than its own block, one that visits and one tile of logits, forward and backward. The softmax is
the running one of Milakov & Gimelshein 2018, its backward pass that of FlashAttention-2 (Dao 2023).

Shapes inside: b rows, t columns, g key heads and n query heads for each of them, on one device; s columns of a tile.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from rlhf_jax.models.attention import AttentionFn, Sight, xla_attention

EVER = np.iinfo(np.int32).max
"""Width of a window that sees all before it."""
LEAST = np.finfo(np.float32).min


class _Ring(NamedTuple):
    """What is known before anything is traced."""

    mesh: Mesh
    rows: tuple[str, ...]
    columns: str
    heads: str | None
    hops: int
    """Blocks that a query may see, its own included."""
    tile: int
    scale: float
    softcap: float | None


class _Block(NamedTuple):
    """What travels forward."""

    key: jax.Array
    """`[b, t, g, C]`."""
    value: jax.Array
    segments: jax.Array
    """`[b, t]`."""


@functools.cache
def ring_attention_on(
    mesh: Mesh,
    *,
    rows: tuple[str, ...] = ("data", "fsdp"),
    columns: str = "sequence",
    heads: str | None = "tensor",
    tile: int = 512,
    otherwise: AttentionFn = xla_attention,
) -> AttentionFn:
    """Attention for whole rows whose columns a mesh splits: every device computes its own queries and sends its keys on.

    One collective-permute of a block of keys and values a hop, forward; with their gradients (float32), backward.
    Where all layers have windows, blocks travel no farther than the widest. `otherwise` instead
    - where the mesh has one part of the columns (it is what is returned),
    - where the keys are not the queries' own row (a cache: prefill and decoding),
    - where the mesh does not divide rows, columns or key heads.

    Equal arguments give the same object, so that configs with it are equal.

    Args:
      mesh: from `make_mesh`.
      rows: mesh axes that split B.
      columns: mesh axis that splits T.
      heads: mesh axis that splits the heads.
      tile: keys of a block whose logits `[b, g, n, t, tile]` are made at a time, where it divides the block.
      otherwise: the implementation for all else.
    """
    size, num_rows = mesh.shape[columns], int(np.prod([mesh.shape[axis] for axis in rows]))
    num_heads = 1 if heads is None else mesh.shape[heads]
    if size == 1:
        return otherwise

    def attend(query, key, value, sight: Sight, *, scale: float, softcap: float | None = None) -> jax.Array:
        length = query.shape[1]
        if key.shape[1] != length or length % size or query.shape[0] % num_rows or key.shape[2] % num_heads:
            return otherwise(query, key, value, sight, scale=scale, softcap=softcap)
        block = length // size
        widest = None if None in sight.windows else max(sight.windows)
        hops = size if widest is None else min(size, -(-(widest - 1) // block) + 1)
        ring = _Ring(mesh, rows, columns, heads, hops, block if block % tile else tile, scale, softcap)
        widths = jnp.asarray([EVER if window is None else window for window in sight.windows])
        return _attention(ring, query, key, value, sight.query_segments, widths[sight.kind])

    return attend


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(ring: _Ring, query, key, value, segments, width) -> jax.Array:
    return _forward(ring, query, key, value, segments, width)[0]


def _forward(ring: _Ring, query, key, value, segments, width):
    """The result, and what the backward pass keeps of it, too: `log Σ exp(logits)`, `[B, G, n, T]`."""

    def own(query, key, value, segments, width):
        query = _grouped(query, key)

        def see(state, block, hop):
            def one(state, tile):
                highest, total, summed = state
                logits, seen = _logits(ring, query, segments, *tile, width, hop)
                logits = jnp.where(seen, logits, LEAST)
                top = jnp.maximum(highest, logits.max(axis=-1))
                weights = jnp.where(seen, jnp.exp(logits - top[..., None]), 0.0)
                value = tile[0].value
                product = _product("bgnts,bsgc->bgntc", weights.astype(value.dtype), value)
                kept = jnp.exp(highest - top)
                return (top, total * kept + weights.sum(axis=-1), summed * kept[..., None] + product), None

            return jax.lax.scan(one, state, _tiles(ring, block))[0], block

        shape = (query.shape[0], *query.shape[2:4], query.shape[1])
        none = jnp.full(shape, LEAST), jnp.zeros(shape), jnp.zeros((*shape, value.shape[3]))
        (highest, total, summed), _ = _travel(ring, see, none, _Block(key, value, segments))
        total = jnp.where(total > 0, total, 1.0)  # padding sees nothing and gives 0
        return _ungrouped(summed / total[..., None]).astype(value.dtype), highest + jnp.log(total)

    array, row, kept = _specs(ring)
    specs = {"in_specs": (array, array, array, row, PartitionSpec()), "out_specs": (array, kept)}
    return jax.shard_map(own, mesh=ring.mesh, **specs, check_vma=False)(query, key, value, segments, width)


def _forward_and_kept(ring: _Ring, *inputs):
    found, norms = _forward(ring, *inputs)
    return found, (*inputs, found, norms)


def _backward(ring: _Ring, kept, towards):
    def own(query, key, value, segments, width, found, norms, towards):
        found, towards, query = (_grouped(x, key) for x in (found, towards, query))
        along = _product("btgnc,btgnc->bgnt", found, towards)

        def see(to_query, visitor, hop):
            def one(to_query, tile):
                block, _ = tile
                logits, seen = _logits(ring, query, segments, *tile, width, hop)
                weights = jnp.where(seen, jnp.exp(jnp.where(seen, logits, LEAST) - norms[..., None]), 0.0)
                to_value = _product("bgnts,btgnc->bsgc", weights.astype(towards.dtype), towards)
                to_logits = weights * (_product("btgnc,bsgc->bgnts", towards, block.value) - along[..., None])
                if ring.softcap is not None:
                    to_logits = to_logits * (1 - jnp.square(logits / ring.softcap))
                to_logits = (ring.scale * to_logits).astype(query.dtype)
                to_query = to_query + _product("bgnts,bsgc->btgnc", to_logits, block.key)
                return to_query, (_product("bgnts,btgnc->bsgc", to_logits, query), to_value)

            block, *before = visitor
            to_query, now = jax.lax.scan(one, to_query, _tiles(ring, block))
            return to_query, (block, *(x + _untiled(y) for x, y in zip(before, now, strict=True)))

        visitor = (_Block(key, value, segments), jnp.zeros(key.shape), jnp.zeros(value.shape))
        to_query, (_, *gradients) = _travel(ring, see, jnp.zeros(query.shape), visitor)
        to_key, to_value = _shift(ring, gradients, 1 - ring.hops)  # home
        to_query = to_query.reshape(*to_query.shape[:2], -1, to_query.shape[4])
        return to_query.astype(query.dtype), to_key.astype(key.dtype), to_value.astype(value.dtype)

    array, row, norm = _specs(ring)
    specs = {"in_specs": (array, array, array, row, PartitionSpec(), array, norm, array), "out_specs": (array,) * 3}
    return *jax.shard_map(own, mesh=ring.mesh, **specs, check_vma=False)(*kept, towards), None, None


_attention.defvjp(_forward_and_kept, _backward)


def _specs(ring: _Ring) -> tuple[PartitionSpec, PartitionSpec, PartitionSpec]:
    """Of `[B, T, heads, C]`, of `[B, T]`, and of `[B, G, n, T]`."""
    rows = ring.rows or None
    return (
        PartitionSpec(rows, ring.columns, ring.heads),
        PartitionSpec(rows, ring.columns),
        PartitionSpec(rows, ring.heads, None, ring.columns),
    )


def _travel(ring: _Ring, see: Callable, state: Any, visitor: Any) -> tuple[Any, Any]:
    """`see(state, visitor, hop) -> (state, visitor)` with the own block, then with those of the devices before.

    A block that nobody changes leaves while it is looked at, so that the compiler can hide its way.
    """

    def hop(carry, number):
        state, visitor = see(*carry, number)
        return (state, _shift(ring, visitor, 1)), None

    carry, _ = jax.lax.scan(hop, (state, visitor), jnp.arange(ring.hops - 1))
    return see(*carry, jnp.asarray(ring.hops - 1))


def _shift(ring: _Ring, tree: Any, by: int) -> Any:
    size = ring.mesh.shape[ring.columns]
    return jax.lax.ppermute(tree, ring.columns, [(place, (place + by) % size) for place in range(size)])


def _tiles(ring: _Ring, block: _Block) -> tuple[_Block, jax.Array]:
    """A block in tiles on a new first dimension, and the column of each in it."""

    def cut(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(x.shape[0], -1, ring.tile, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, block), jnp.arange(0, block.key.shape[1], ring.tile)


def _untiled(x: jax.Array) -> jax.Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _logits(ring: _Ring, query, segments, tile: _Block, offset, width, hop) -> tuple[jax.Array, jax.Array]:
    """Logits `[b, g, n, t, s]` of a tile of the block that comes from `hop` devices before, and which are seen."""
    place, length = jax.lax.axis_index(ring.columns), query.shape[1]
    source = (place - hop) % ring.mesh.shape[ring.columns]
    ahead = (place - source) * length - offset
    behind = ahead + jnp.arange(length)[:, None] - jnp.arange(ring.tile)[None, :]
    same = (segments[:, :, None] == tile.segments[:, None, :]) & (tile.segments[:, None, :] > 0)
    seen = same & ((behind >= 0) & (behind < width))[None]
    logits = ring.scale * _product("btgnc,bsgc->bgnts", query, tile.key)
    logits = logits if ring.softcap is None else ring.softcap * jnp.tanh(logits / ring.softcap)
    return logits, seen[:, None, None]


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _grouped(x: jax.Array, key: jax.Array) -> jax.Array:
    """`[b, t, g * n, C]` to `[b, t, g, n, C]`."""
    return x.reshape(*x.shape[:2], key.shape[2], -1, x.shape[3])


def _ungrouped(x: jax.Array) -> jax.Array:
    """`[b, g, n, t, C]` to `[b, t, g * n, C]`."""
    x = jnp.moveaxis(x, 3, 1)
    return x.reshape(*x.shape[:2], -1, x.shape[4])

"""Attention: which keys a query sees, and the implementations of the product itself, one function each.

Models say what is seen (`Sight`); an implementation takes from it what it needs. Where a kernel does not apply, its
function computes the same with `xla_attention`, by the rule that its docstring states.
"""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import Mesh, PartitionSpec

from rlhf_jax.types import PickFn

AttentionFn: TypeAlias = Callable[..., jax.Array]
"""`attend(query [B, T, N, C], key [B, S, G, C], value [B, S, G, C], sight, *, scale, softcap) -> [B, T, N, C]`;
N query heads share G key heads, N / G neighbours each. Logits are `scale * q·k`, where a soft cap is given through
`softcap * tanh(logits / softcap)`. Rows of padding hold anything finite."""

TPU_BLOCK = 128
"""Rows and columns of the smallest tile of `tpu_attention`: the lanes of a TPU's vector unit."""
TPU_BLOCKS = (512, 256, TPU_BLOCK)


@struct.dataclass
class Sight:
    """Which keys every query sees, as a mask and as that from which the mask is made; what nobody reads costs nothing."""

    mask: jax.Array
    """`[B, 1, T, S]` bool, True = sees: `causal_mask`, and the window of the layer."""
    query_segments: jax.Array
    """`[B, T]`, 0 = padding."""
    key_segments: jax.Array
    """`[B, S]`."""
    kind: jax.Array
    """`[]`: the layer's place in `windows`; it may be traced."""
    windows: tuple[int | None, ...] = struct.field(pytree_node=False, default=(None,))
    """Tokens that a query of each kind of layer sees, itself included; None sees all before it."""

    def of(self, pick: PickFn) -> "Sight":
        """What the picked queries see; the keys stay."""
        mask = jnp.swapaxes(pick(jnp.swapaxes(self.mask, 1, 2)), 1, 2)
        return self.replace(mask=mask, query_segments=pick(self.query_segments))


def causal_mask(query_segments: jax.Array, key_segments: jax.Array, start: jax.Array) -> jax.Array:
    """`[B, 1, T, S]`: the key is not after the query, of the same segment, and no padding.

    Args:
      query_segments: `[B, T]`, 0 = padding.
      key_segments: `[B, S]`.
      start: the column of the first query among the keys.
    """
    causal = distances(query_segments.shape[1], key_segments.shape[1], start) >= 0
    same = query_segments[:, :, None] == key_segments[:, None, :]
    return (same & (key_segments[:, None, :] > 0) & causal[None])[:, None]


def distances(num_queries: int, num_keys: int, start: jax.Array) -> jax.Array:
    """`[T, S]`: how many columns the key lies before the query. A sliding window of w keeps those below w.

    Of a single query no key can come after it: what stands in later columns of a ring is older, by one turn.
    """
    behind = start + jnp.arange(num_queries)[:, None] - jnp.arange(num_keys)[None, :]
    return jnp.where(behind < 0, behind + num_keys, behind) if num_queries == 1 else behind


def sights(
    query_segments: jax.Array, key_segments: jax.Array, start: jax.Array, windows: tuple[int | None, ...]
) -> Callable[[jax.Array], Sight]:
    """A function from a kind of layer (an index into `windows`, it may be traced) to what its queries see.

    Args:
      query_segments: `[B, T]`, 0 = padding.
      key_segments: `[B, S]`.
      start: the column of the first query among the keys.
      windows: of every kind of layer.
    """
    mask = causal_mask(query_segments, key_segments, start)
    widths = jnp.asarray([jnp.iinfo(jnp.int32).max if window is None else window for window in windows])
    behind = distances(mask.shape[2], mask.shape[3], start)

    def sight(kind: jax.Array) -> Sight:
        seen = mask if windows == (None,) * len(windows) else mask & (behind < widths[kind])[None, None]
        return Sight(seen, query_segments, key_segments, kind, windows)

    return sight


def plain_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Sight, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """`softmax(scale * q·k) v` written out, in float32."""
    groups, heads = key.shape[2], query.shape[2]
    query = query.reshape(*query.shape[:2], groups, heads // groups, query.shape[3])
    logits = scale * jnp.einsum("btgnc,bsgc->bgnts", query, key, preferred_element_type=jnp.float32)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    logits = jnp.where(sight.mask[:, :, None], logits, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    attended = jnp.einsum("bgnts,bsgc->btgnc", weights, value)
    return attended.reshape(*attended.shape[:2], heads, attended.shape[4])


def forked_attention(
    query: jax.Array,
    past: tuple[jax.Array, jax.Array, Sight],
    own: tuple[jax.Array, jax.Array, Sight],
    *,
    scale: float,
    softcap: float | None = None,
) -> jax.Array:
    """`plain_attention` over the keys that K rows share and then each row's own: one softmax over both parts.

    The K rows of a past are queries of one product with it, so that it is read once and held once.

    Args:
      query: `[B * K, T, N, C]`; rows of one past are neighbours.
      past: keys `[B, P, G, C]`, values, and what each of the `B * K` rows sees of them.
      own: keys `[B * K, S, G, C]`, values, and what is seen of them.
      scale, softcap: of the logits.
    """
    num_rows, length, heads, width = query.shape
    num_pasts, num_shared, groups, _ = past[0].shape
    branches, per_group = num_rows // num_pasts, heads // groups
    query = query.reshape(num_pasts, branches, length, groups, per_group, width)
    logits = [
        jnp.einsum("bktgnc,bpgc->bkgntp", query, past[0], preferred_element_type=jnp.float32),
        jnp.einsum(
            "bktgnc,bksgc->bkgnts",
            query,
            own[0].reshape(num_pasts, branches, *own[0].shape[1:]),
            preferred_element_type=jnp.float32,
        ),
    ]
    mask = jnp.concatenate([past[2].mask, own[2].mask], axis=-1).reshape(num_pasts, branches, 1, 1, length, -1)
    logits = scale * jnp.concatenate(logits, axis=-1)
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    weights = jax.nn.softmax(jnp.where(mask, logits, jnp.finfo(jnp.float32).min), axis=-1).astype(query.dtype)
    of_past, of_own = weights[..., :num_shared], weights[..., num_shared:]
    attended = jnp.einsum("bkgntp,bpgc->bktgnc", of_past, past[1]) + jnp.einsum(
        "bkgnts,bksgc->bktgnc", of_own, own[1].reshape(num_pasts, branches, *own[1].shape[1:])
    )
    return attended.reshape(num_rows, length, heads, width)


def xla_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Sight, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """`jax.nn.dot_product_attention` as XLA compiles it: any device, any dtype. With a soft cap `plain_attention`."""
    if softcap is not None:
        return plain_attention(query, key, value, sight, scale=scale, softcap=softcap)
    return jax.nn.dot_product_attention(query, key, value, mask=sight.mask, scale=scale, implementation="xla")


def blocked_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight,
    *,
    scale: float,
    softcap: float | None = None,
    block: int = 64,
) -> jax.Array:
    """`plain_attention`, some queries at a time over the keys up to theirs: for training on CPUs.

    Keys after a block's last query are seen by none of it and left out: `(1 + block / T) / 2` of the products, of what the
    backward pass keeps and of the softmax, in pieces that stay in a core's cache. What is left is the same arithmetic.
    `xla_attention` instead where the keys are not the queries' own row (a cache: prefill and decoding), and where T is no
    multiple of `block` of two blocks or more.

    Args:
      query, key, value, sight, scale, softcap: as in every implementation.
      block: queries at a time; more make fewer, larger products.
    """
    length = query.shape[1]
    if key.shape[1] != length or length % block or length == block:
        return xla_attention(query, key, value, sight, scale=scale, softcap=softcap)

    def attend(start: int) -> jax.Array:
        rows, seen = slice(start, start + block), slice(start + block)
        part = sight.replace(
            mask=sight.mask[:, :, rows, seen],
            query_segments=sight.query_segments[:, rows],
            key_segments=sight.key_segments[:, seen],
        )
        return plain_attention(query[:, rows], key[:, seen], value[:, seen], part, scale=scale, softcap=softcap)

    return jnp.concatenate([attend(start) for start in range(0, length, block)], axis=1)


def cudnn_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, sight: Sight, *, scale: float, softcap: float | None = None
) -> jax.Array:
    """cuDNN's fused kernel: NVIDIA GPUs, bfloat16 or float16, head width a multiple of 8 up to 128.

    `xla_attention` instead with a soft cap, and where T or S is odd, for which it has no gradient. Where the keys are the
    queries' own row, it is told that none sees a later one, which the mask says too, and skips half of the products. Not
    under `vmap`, where JAX (up to 0.11.2) cannot batch a mask that heads share; see `under_vmap`.
    """
    if softcap is not None or query.shape[1] % 2 or key.shape[1] % 2:
        return xla_attention(query, key, value, sight, scale=scale, softcap=softcap)
    options = {"mask": sight.mask, "scale": scale, "is_causal": query.shape[1] == key.shape[1]}
    return jax.nn.dot_product_attention(query, key, value, **options, implementation="cudnn")


def under_vmap(attention_fn: AttentionFn) -> AttentionFn:
    """The implementation for many networks at once: `xla_attention` in the place of `cudnn_attention`, else the same."""
    return xla_attention if attention_fn is cudnn_attention else attention_fn


def tpu_attention(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    sight: Sight,
    *,
    scale: float,
    softcap: float | None = None,
    mesh: Mesh | None = None,
    rows: tuple[str, ...] = (),
    heads: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """Splash attention, JAX's Pallas kernel for TPUs: no `[T, S]` array, and tiles that no query sees are skipped.

    Packed rows, padding on either side, windows, shared heads and soft caps are its own. `xla_attention` instead
    - where the keys are not the queries' own row (a cache: prefill and decoding),
    - where T is no multiple of 128,
    - where the mesh does not divide the rows or the key heads.

    Args:
      query: `[B, T, N, C]`.
      key: `[B, S, G, C]`.
      value: `[B, S, G, C]`.
      sight: what is seen; padding sees padding here, which no other row reads.
      scale: multiplies the queries, in float32, before they are rounded to their dtype.
      softcap: of the logits, or None.
      mesh: over which the arrays are split; XLA cannot split a kernel by itself. None: one device.
      rows: mesh axes that split B.
      heads: mesh axis that splits N and G.
      interpret: run it on a CPU, slowly, for tests.
    """
    length, num_heads = query.shape[1], query.shape[2]
    sizes = {} if mesh is None else mesh.shape
    shares = (int(np.prod([sizes[axis] for axis in rows if sizes])), sizes[heads] if sizes and heads else 1)
    divided = not query.shape[0] % shares[0] and not key.shape[2] % shares[1]
    if key.shape[1] != length or length % TPU_BLOCK or not divided:
        return xla_attention(query, key, value, sight, scale=scale, softcap=softcap)
    query = (scale * query.astype(jnp.float32)).astype(query.dtype)
    kernels = [
        _splash(length, num_heads // shares[1], window, softcap, interpret) for window in dict.fromkeys(sight.windows)
    ]
    which = jnp.asarray([list(dict.fromkeys(sight.windows)).index(window) for window in sight.windows])

    def attend(query, key, value, segments, kind):
        by_head = [jnp.swapaxes(x, 1, 2) for x in (query, key, value)]
        attended = jax.lax.switch(which[kind], kernels, *by_head, segments)
        return jnp.swapaxes(attended, 1, 2)

    if mesh is not None and mesh.size > 1:
        split = PartitionSpec(rows or None, None, heads, None)
        specs = (split, split, split, PartitionSpec(rows or None), PartitionSpec())
        attend = jax.shard_map(attend, mesh=mesh, in_specs=specs, out_specs=split, check_vma=False)
    return attend(query, key, value, sight.query_segments, sight.kind)


def _splash(length: int, num_heads: int, window: int | None, softcap: float | None, interpret: bool):
    """The kernel of all heads over the rows: `(query, key, value [B, heads, T, C], segments [B, T]) -> [B, N, T, C]`."""
    from jax.experimental.pallas.ops.tpu import splash_attention as splash  # takes a second to import

    block = next(size for size in TPU_BLOCKS if not length % size)
    names = ("q", "kv", "kv_compute", "q_dkv", "kv_dkv", "kv_dkv_compute", "q_dq", "kv_dq")
    sizes = splash.BlockSizes(**{f"block_{name}": block for name in names})
    shape = (length, length)
    mask = splash.CausalMask(shape) if window is None else splash.LocalMask(shape, (window - 1, 0), 0)
    kernel = splash.make_splash_mha(
        splash.MultiHeadMask([mask] * num_heads),
        block_sizes=sizes,
        head_shards=1,
        q_seq_shards=1,
        attn_logits_soft_cap=softcap,
        interpret=interpret,
    )
    return jax.vmap(
        lambda query, key, value, segments: kernel(query, key, value, splash.SegmentIds(segments, segments))
    )


@functools.cache
def _on_mesh(mesh: Mesh, rows: tuple[str, ...], heads: str | None) -> AttentionFn:
    """One object for equal arguments, so that configs with it are equal."""
    return functools.partial(tpu_attention, mesh=mesh, rows=rows, heads=heads)


def best_for(
    device: jax.Device,
    *,
    dtype: str,
    head_dim: int,
    mesh: Mesh | None = None,
    rows: tuple[str, ...] = (),
    heads: str | None = None,
) -> AttentionFn:
    """The fastest implementation that `device` has for this dtype and head width. Scripts ask; models do not.

    Args:
      device: one of those that will compute.
      dtype: of the queries.
      head_dim: C.
      mesh, rows, heads: of `tpu_attention`; the others split by themselves.
    """
    half = jnp.dtype(dtype).itemsize == 2
    if device.platform == "tpu" and jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32):
        return tpu_attention if mesh is None or mesh.size == 1 else _on_mesh(mesh, rows, heads)
    nvidia = device.platform == "gpu" and "nvidia" in device.device_kind.lower()
    if nvidia and half and not head_dim % 8 and head_dim <= 128:
        return cudnn_attention
    return xla_attention

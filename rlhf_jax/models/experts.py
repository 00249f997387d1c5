"""Mixture of experts: every token through the few gated MLPs that a router picks for it (Shazeer et al. 2017)."""

import functools
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

ExpertsFn: TypeAlias = Callable[..., jax.Array]
"""`experts(hidden [B, T, D], router [D, E], gate, up, down, *, experts_per_token, renormalize, activation) -> [B, T, D]`,
the matrices as `expert_mlp` takes them: `routed_mlp`, or what `experts_on(mesh)` gives."""


def routed_mlp(
    hidden: jax.Array,
    router: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    experts_per_token: int,
    renormalize: bool,
    activation,
) -> jax.Array:
    """Every token of `hidden [B, T, D]` through its experts: `expert_mlp` with what `route` says.

    Tokens are sorted by expert over the whole batch. Where XLA splits the batch over devices, it gathers the tokens for
    that; `experts_on(mesh)` sorts them where they are.
    """
    flat = hidden.reshape(-1, hidden.shape[-1])
    options = {"experts_per_token": experts_per_token, "renormalize": renormalize}
    chosen, shares = route(flat.astype(jnp.float32), router, **options)
    return expert_mlp(flat, chosen, shares, gate, up, down, activation=activation).reshape(hidden.shape)


@functools.cache
def experts_on(
    mesh: Mesh,
    *,
    rows: tuple[str, ...] = ("data", "fsdp"),
    columns: str = "sequence",
    experts: str = "expert",
    width: str = "tensor",
) -> ExpertsFn:
    """`routed_mlp` in parts: each device sorts its own tokens and runs its own experts on them; the results are summed.

    One all-reduce of `[B, T, D]` over `experts` and `width`; tokens never move. Equal arguments give the same object, so
    that configs with it are equal.

    Args:
      mesh: from `make_mesh`.
      rows: mesh axes that split B.
      columns: mesh axis that splits T, where it divides it.
      experts: mesh axis that splits E, which it must divide.
      width: mesh axis that splits F, which it must divide.
    """

    def routed(hidden, router, gate, up, down, *, experts_per_token, renormalize, activation):
        def own(hidden, router, gate, up, down):
            flat = hidden.reshape(-1, hidden.shape[-1])
            options = {"experts_per_token": experts_per_token, "renormalize": renormalize}
            chosen, shares = route(flat.astype(jnp.float32), router, **options)
            index = chosen - gate.shape[0] * jax.lax.axis_index(experts)
            here = (index >= 0) & (index < gate.shape[0])
            # Copies for other devices' experts are sorted behind all groups, where `ragged_dot` gives 0.
            index, shares = jnp.where(here, index, gate.shape[0]), jnp.where(here, shares, 0.0)
            # Said aloud: where only the indices of a gather differ between devices, JAX 0.10 sums no gradient over them.
            flat = jax.lax.pcast(flat, (experts, width), to="varying")
            part = expert_mlp(flat, index, shares, gate, up, down, activation=activation)
            return jax.lax.psum(part.astype(jnp.float32), (experts, width)).astype(hidden.dtype).reshape(hidden.shape)

        split = PartitionSpec(rows, None if hidden.shape[1] % mesh.shape[columns] else columns)
        widening = PartitionSpec(experts, None, width)
        specs = (split, PartitionSpec(), widening, widening, PartitionSpec(experts, width))
        on_mesh = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=split)
        return on_mesh(hidden, router, gate, up, down)

    return routed


def route(
    hidden: jax.Array, router: jax.Array, *, experts_per_token: int, renormalize: bool
) -> tuple[jax.Array, jax.Array]:
    """The k most likely experts `[N, k]` of each token and their weights `[N, k]`, float32.

    Args:
      hidden: `[N, D]`.
      router: `[D, E]`.
      experts_per_token: k.
      renormalize: whether the k weights are made to sum to 1 (Mixtral; Qwen3-MoE by choice).
    """
    logits = jnp.einsum("nd,de->ne", hidden, router, preferred_element_type=jnp.float32)
    weights, chosen = jax.lax.top_k(jax.nn.softmax(logits, axis=-1), experts_per_token)
    return chosen, weights / weights.sum(axis=-1, keepdims=True) if renormalize else weights


def expert_mlp(
    hidden: jax.Array,
    chosen: jax.Array,
    weights: jax.Array,
    gate: jax.Array,
    up: jax.Array,
    down: jax.Array,
    *,
    activation,
) -> jax.Array:
    """`Σ_k weight_k * down_k(activation(gate_k x) * up_k x)`, `[N, D]`.

    Token copies are sorted by expert and each matrix product runs once over all of them, group by group
    (`jax.lax.ragged_dot`): no capacity, no dropped token, nothing computed for experts that nobody chose.

    Args:
      hidden: `[N, D]`.
      chosen: `[N, k]` experts.
      weights: `[N, k]`.
      gate: `[E, D, F]`, as is `up`.
      up: `[E, D, F]`.
      down: `[E, F, D]`.
      activation: of the gate.
    """
    num_tokens, per_token = chosen.shape
    flat = chosen.reshape(-1)
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=gate.shape[0])
    rows = hidden[order // per_token]
    inner = activation(jax.lax.ragged_dot(rows, gate, sizes)) * jax.lax.ragged_dot(rows, up, sizes)
    # Weighted and summed in float32: the weights' gradient is a sum over D, the output one over k.
    outputs = jax.lax.ragged_dot(inner, down, sizes).astype(jnp.float32) * weights.reshape(-1)[order][:, None]
    summed = jnp.zeros((num_tokens, hidden.shape[1]), jnp.float32).at[order // per_token].add(outputs)
    return summed.astype(hidden.dtype)

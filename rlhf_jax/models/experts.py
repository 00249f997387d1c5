"""Mixture of experts: every token through the few gated MLPs that a router picks for it (Shazeer et al. 2017)."""

import jax
import jax.numpy as jnp


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

"""Heads on a trunk: one number per position, for reward and value models, or one per attribute.

A reward model is `{"trunk": params of a causal model, "head": a scalar head}`; a critic has the same form, or holds a
head alone when it shares the policy's trunk.
"""

import jax
import jax.numpy as jnp

from rlhf_jax.functional.masking import last_true_index, masked_mean, positions_from_segments
from rlhf_jax.models.parameters import ParamSpec, Specs
from rlhf_jax.models.picking import column_of_row, hidden_at
from rlhf_jax.types import CausalModel, Params


def head_specs(model_dim: int) -> Specs:
    """The arrays of a reward or value head with shape and logical axes, as `transformer.param_specs`."""
    return {"weight": ParamSpec((model_dim,), ("embed",), (model_dim + 1) ** -0.5), "bias": ParamSpec((), (), 0.0)}


def init_reward_head(key: jax.Array, model_dim: int) -> Params:
    """Weights N(0, 1/(d+1)), bias 0 (Stiennon et al. 2020; lm-human-preferences `model.py`)."""
    stddev = (model_dim + 1) ** -0.5
    return {"weight": stddev * jax.random.normal(key, (model_dim,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def init_value_head(model_dim: int) -> Params:
    """All zeros, so the first advantages are the shaped rewards themselves (lm-human-preferences `model.py`)."""
    return {"weight": jnp.zeros((model_dim,), jnp.float32), "bias": jnp.zeros((), jnp.float32)}


def init_attribute_head(key: jax.Array, model_dim: int, num_attributes: int) -> Params:
    """A reward head for each of A rated attributes: `weight [D, A]`, `bias [A]`, spread as `init_reward_head`'s."""
    weight = (model_dim + 1) ** -0.5 * jax.random.normal(key, (model_dim, num_attributes), jnp.float32)
    return {"weight": weight, "bias": jnp.zeros((num_attributes,), jnp.float32)}


def combine_attributes(head: Params, weights: jax.Array) -> Params:
    """The scalar head of the weighted sum of attributes, `weights [A]`: reinforcement learning then needs no other code.

    What people weigh how is decided after the fit (HelpSteer, Wang et al. 2023).
    """
    return {"weight": head["weight"] @ weights, "bias": head["bias"] @ weights}


def attribute_head(head: Params, hidden: jax.Array) -> jax.Array:
    """`[B, T, D]` → `[B, T, A]`: `hidden · weight + bias` in float32."""
    return jnp.einsum("btd,da->bta", hidden.astype(jnp.float32), head["weight"]) + head["bias"][None, None]


def scalar_head(head: Params, hidden: jax.Array) -> jax.Array:
    """`[B, T, D]` → `[B, T]`: `hidden · weight + bias` in float32."""
    return jnp.einsum("btd,d->bt", hidden.astype(jnp.float32), head["weight"]) + head["bias"]


def sequence_scores(
    model: CausalModel,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    mean_over: jax.Array | None = None,
) -> jax.Array:
    """Scores `[B]` of a reward model: the head read at the last real token of each row, or its mean over some tokens.

    The last token is the field's habit (Stiennon et al. 2020). The mean, for completions of equal length, is what a
    small network learns from few comparisons: every token is evidence, not one.

    Args:
      model: the trunk's functions.
      params: `{"trunk": ..., "head": ...}`.
      tokens: `[B, T]` prompt and completion, one sequence a row, padded anywhere.
      segment_ids: `[B, T]`, 0 = padding.
      mean_over: `[B, T]` mask of the tokens to average over, the completion's; None reads the last real token.
    """
    if mean_over is None:
        return scalar_head(params["head"], _final_hidden(model, params["trunk"], tokens, segment_ids))[:, 0]
    hidden, _ = model.hidden(params["trunk"], tokens, positions_from_segments(segment_ids), segment_ids)
    return masked_mean(scalar_head(params["head"], hidden), mean_over, axis=1)


def sequence_attributes(model: CausalModel, params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """Attributes `[B, A]` of whole rows: an attribute head read at the last real token; arguments of `sequence_scores`."""
    return attribute_head(params["head"], _final_hidden(model, params["trunk"], tokens, segment_ids))[:, 0]


def ensemble_scores(
    model: CausalModel,
    params: Params,
    tokens: jax.Array,
    segment_ids: jax.Array,
    mean_over: jax.Array | None = None,
) -> jax.Array:
    """Scores `[M, B]` of M reward models whose params are stacked on a leading axis; arguments of `sequence_scores`."""
    return jax.vmap(lambda member: sequence_scores(model, member, tokens, segment_ids, mean_over))(params)


def _final_hidden(model: CausalModel, trunk: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
    """The hidden state `[B, 1, D]` of every row's last real token."""
    pick = column_of_row(last_true_index(segment_ids > 0))
    return hidden_at(model, trunk, tokens, positions_from_segments(segment_ids), segment_ids, pick)[0]

"""Best-of-n: several completions of every prompt, of which the best is kept."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rlhf_jax.generation.generate import generate
from rlhf_jax.types import CausalModel, Generation, Params, PromptBatch


def best_of_n(
    model: CausalModel,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    score_fn: Callable[[Generation], jax.Array],
    num_samples: int,
    **options: Any,
) -> tuple[Generation, jax.Array]:
    """Sample n completions of every prompt, keep the one that scores best; pure and jittable (Stiennon et al. 2020).

    No training, and n times the sampling: all `B * n` rows are decoded side by side, so give fewer prompts at a time
    where memory ends. How far it goes from `params` is at most `best_of_n_kl(num_samples)` nats.

    Args:
      model: any causal model's functions.
      params: its parameters.
      prompts: left-padded `[B, P]`.
      key: consumed.
      score_fn: `Generation -> scores [B * n]`; of a reward model, `partial(make_score_fn(...), frozen)`. Of equal scores the
        first sample is kept.
      num_samples: n; 1 is sampling.
      **options: of `generate`: `max_new_tokens`, `eos_id`, `pad_id`, `temperature`, ...

    Returns:
      `Generation` of B rows, and their scores `[B]`.
    """
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    generation = generate(model, params, prompts, key, samples_per_prompt=num_samples, **options)
    scores = score_fn(generation)
    if scores.shape != generation.ended.shape:
        raise ValueError(
            f"score_fn gave shape {scores.shape} for {generation.ended.size} completions; fix: one score a completion"
        )
    rows = best_rows(scores, group_size=num_samples)
    return jax.tree.map(lambda x: x[rows], generation), scores[rows]


def best_rows(scores: jax.Array, *, group_size: int) -> jax.Array:
    """Row of the best completion of every prompt, `[B] -> [B / group_size]`; of equal scores the first."""
    return jnp.arange(0, scores.shape[0], group_size) + jnp.argmax(scores.reshape(-1, group_size), axis=1)

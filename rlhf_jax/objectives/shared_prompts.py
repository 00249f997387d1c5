"""Comparisons run their prompt once: prefill, fork the cache, and the responses go on from it, forward and backward.

The plain objectives run a prompt as often as it has responses. Here `[B, K, T]` rows become B prompts and `B * K`
completions, and what is found returns in the rows' own alignment, so that losses do not know. Same numbers to rounding.
A cache is no place for `remat`: activations of all layers are kept.

Shapes: B prompts, K responses to each, T tokens of a row, P of a prompt, R of a response.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from rlhf_jax.functional.masking import last_true_index, masked_mean, positions_from_segments
from rlhf_jax.models.heads import scalar_head
from rlhf_jax.models.picking import column_of_row, hidden_at, last_columns
from rlhf_jax.objectives.forward import policy_laws
from rlhf_jax.types import Cache, CausalModel, LabelledBatch, Params, PickFn, PreferenceBatch, RankingBatch

Comparisons = RankingBatch | PreferenceBatch | LabelledBatch
"""Batches whose rows `[B, K, T]` answer the same prompt; K = 2 of pairs."""


class SharedPrompts(NamedTuple):
    """Columns that the parts are given. A batch that does not fit, or whose rows have different prompts, yields NaN: no step
    is taken with it, and the host's check of what is finite raises. Places that a ranking masks out are not compared."""

    prompt: int
    completion: int


@struct.dataclass
class _Parts:
    prompts: jax.Array  # [B, P], left-padded
    prompt_segments: jax.Array  # [B, P]
    completions: jax.Array  # [B * K, R], right-padded: from the response's first token to the row's end
    segments: jax.Array  # [B * K, R]
    first: jax.Array  # [B, K], where the response begins in its row
    fits: jax.Array  # [B, K]


def shared_sizes(tokens: np.ndarray, segment_ids: np.ndarray, completion_mask: np.ndarray) -> SharedPrompts:
    """The smallest that all rows `[..., T]` fit into. Host code."""
    real, columns = np.asarray(segment_ids) > 0, np.arange(np.shape(tokens)[-1])
    mask = np.asarray(completion_mask)
    held = mask.any(axis=-1)
    first = mask.argmax(axis=-1)[..., None]
    before = (real & (columns < first)).sum(axis=-1)[held]
    after = (real & (columns >= first)).sum(axis=-1)[held]
    return SharedPrompts(int(before.max(initial=1)), int(after.max(initial=1)))


def shared_scores(
    model: CausalModel, params: Params, batch: Comparisons, sizes: SharedPrompts, *, mean_over_completion: bool = False
) -> jax.Array:
    """`sequence_scores` of all responses, `[B, K]`: the head read at the last token, or its mean over the completion's.

    Of places that a ranking masks out the scores are finite and mean nothing.

    Args:
      model: the trunk's functions, `fork_cache` among them.
      params: `{"trunk": ..., "head": ...}`.
      batch: one sequence a row, padded anywhere; the tokens before the first completion token are the prompt.
      sizes: of the parts.
      mean_over_completion: where the head is read.

    Raises:
      ValueError: while tracing, a model that cannot fork its cache.
    """
    parts = _split(batch, sizes)
    _, cache = _prefill(model, params["trunk"], parts)
    if mean_over_completion:
        values = scalar_head(params["head"], _complete(model, params["trunk"], parts, cache))
        counted = _from_rows(batch.completion_mask, parts, sizes.completion) & (parts.segments > 0)
        scores = masked_mean(values, counted, axis=1)
    else:
        last = column_of_row(last_true_index(parts.segments > 0))
        scores = scalar_head(params["head"], _complete(model, params["trunk"], parts, cache, last))[:, 0]
    return _only_what_fits(scores.reshape(parts.fits.shape), parts.fits)


def shared_token_logprobs(model: CausalModel, params: Params, batch: Comparisons, sizes: SharedPrompts) -> jax.Array:
    """`sequence_token_logprobs` of all rows, `[B, K, T]`; 0 before the completion, whose logits alone are made.

    Arguments and errors as of `shared_scores`; `params` are the model's own.
    """
    parts = _split(batch, sizes)
    num_responses = parts.fits.shape[1]
    before, cache = _prefill(model, params, parts)
    states = _complete(model, params, parts, cache)
    states = jnp.concatenate([jnp.repeat(before, num_responses, axis=0), states], axis=1)
    # The column before the completion says nothing of itself: any token may stand there.
    tokens = jnp.pad(parts.completions, ((0, 0), (1, 0)))
    counted = jnp.pad(_from_rows(batch.completion_mask, parts, sizes.completion), ((0, 0), (1, 0)))
    logprobs = last_columns(sizes.completion)(policy_laws(model, params, states, tokens, counted).logprobs)
    logprobs = logprobs.reshape(*parts.fits.shape, sizes.completion)
    column = _range(0, batch.tokens.shape[2]) - parts.first[:, :, None]
    found = jnp.take_along_axis(logprobs, jnp.clip(column, 0, sizes.completion - 1), axis=2)
    return _only_what_fits(jnp.where(batch.completion_mask, found, 0.0), parts.fits[:, :, None])


def _split(batch: Comparisons, sizes: SharedPrompts) -> _Parts:
    """Prompts, of the first row that counts, and completions. A row counts that holds a response and is not masked out."""
    real, held = batch.segment_ids > 0, jnp.any(batch.completion_mask, axis=2)
    counts = held & batch.mask if isinstance(batch, RankingBatch) else held
    first, begin = jnp.argmax(batch.completion_mask, axis=2), jnp.argmax(real, axis=2)
    sizes_of_prompts, end = first - begin, real.shape[2] - jnp.argmax(real[:, :, ::-1], axis=2)
    prompt_columns = first[:, :, None] + _range(-sizes.prompt, 0)
    prompts = _gather(batch.tokens, prompt_columns, prompt_columns >= begin[:, :, None])
    chosen = jnp.argmax(counts, axis=1)[:, None]
    sizes_of_chosen = jnp.take_along_axis(sizes_of_prompts, chosen, axis=1)
    prompt = jnp.take_along_axis(prompts, chosen[:, :, None], axis=1)
    same = jnp.all(prompts == prompt, axis=2) & (sizes_of_prompts == sizes_of_chosen)
    fits = same & (sizes_of_prompts <= sizes.prompt) & (end - first <= sizes.completion)
    columns = first[:, :, None] + _range(0, sizes.completion)
    inside = (columns < end[:, :, None]) & held[:, :, None]
    flat = (-1, sizes.completion)
    return _Parts(
        prompts=prompt[:, 0],
        prompt_segments=(_range(-sizes.prompt, 0)[0] >= -sizes_of_chosen).astype(jnp.int32),
        completions=_gather(batch.tokens, columns, inside).reshape(flat),
        segments=inside.astype(jnp.int32).reshape(flat),
        first=first,
        fits=fits | ~counts,
    )


def _range(start: int, stop: int) -> jax.Array:
    return jnp.arange(start, stop)[None, None]


def _gather(rows: jax.Array, columns: jax.Array, inside: jax.Array) -> jax.Array:
    """`rows[b, k, columns[b, k]]`, and 0 outside."""
    found = jnp.take_along_axis(rows, jnp.clip(columns, 0, rows.shape[2] - 1), axis=2)
    return jnp.where(inside, found, jnp.zeros((), rows.dtype))


def _from_rows(rows: jax.Array, parts: _Parts, number: int) -> jax.Array:
    """Columns of `[B, K, T]` from the completion's first on, `[B * K, number]`."""
    columns = parts.first[:, :, None] + _range(0, number)
    return _gather(rows, columns, columns < rows.shape[2]).reshape(-1, number)


def _prefill(model: CausalModel, params: Params, parts: _Parts) -> tuple[jax.Array, Cache]:
    """The state `[B, 1, D]` of each prompt's last token, and a cache that is forked into K branches."""
    if model.fork_cache is None:
        raise ValueError("the model has no fork_cache; fix: leave shared prompts off, or give it one (see CausalModel)")
    num_prompts, length = parts.prompts.shape
    num_responses, room = parts.fits.shape[1], parts.completions.shape[1]
    cache, segments = model.init_cache(num_prompts, length), parts.prompt_segments
    rows = (parts.prompts, positions_from_segments(segments), segments)
    state, cache = hidden_at(model, params, *rows, last_columns(1), cache)
    return state, model.fork_cache(cache, num_responses, room)


def _complete(model: CausalModel, params: Params, parts: _Parts, cache: Cache, pick: PickFn | None = None) -> jax.Array:
    """Hidden states `[B * K, R, D]` of the completions, or of picked columns."""
    begin = jnp.repeat(parts.prompt_segments.sum(axis=1), parts.fits.shape[1])[:, None]
    rows = (parts.completions, begin + jnp.arange(parts.completions.shape[1])[None], parts.segments)
    if pick is None:
        return model.hidden(params, *rows, cache)[0]
    return hidden_at(model, params, *rows, pick, cache)[0]


def _only_what_fits(x: jax.Array, fits: jax.Array) -> jax.Array:
    """NaN elsewhere, in the gradient too."""
    return x * jnp.where(fits, 1.0, jnp.nan)

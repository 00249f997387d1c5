"""Autoregressive sampling: one prefill of the prompts, then a decode loop that ends as soon as every row has ended."""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.generation.hoisting import hoist
from rlhf_jax.generation.sampling import sample_token
from rlhf_jax.models.picking import hidden_at, last_columns
from rlhf_jax.types import Cache, CausalModel, Generation, Params, PromptBatch


class _Loop(NamedTuple):
    """Carry of the decode loop; N = most new tokens."""

    step: jax.Array  # [], tokens written so far
    tokens: jax.Array  # [B, N]
    logprobs: jax.Array  # [B, N]
    mask: jax.Array  # [B, N]
    last: jax.Array  # [B], token written last
    ended: jax.Array  # [B], end of sequence emitted
    stopped: jax.Array  # [B], ended or out of room
    cache: Cache


def _prefill(
    model: CausalModel, params: Params, prompts: PromptBatch, num_samples: int, max_new_tokens: int
) -> tuple[Cache, jax.Array]:
    """A cache of `B * K` rows with room for the completions, and the logits `[B * K, V]` of their first tokens."""
    shared = num_samples > 1 and model.fork_cache is not None
    if not shared:
        prompts = jax.tree.map(lambda x: jnp.repeat(x, num_samples, axis=0), prompts)
    num_rows, prompt_length = prompts.tokens.shape
    cache = model.init_cache(num_rows, prompt_length if shared else prompt_length + max_new_tokens)
    segments = prompts.mask.astype(jnp.int32)
    positions = positions_from_segments(segments)
    hidden, cache = hidden_at(model, params, prompts.tokens, positions, segments, last_columns(1), cache)
    logits = model.unembed(params, hidden[:, 0])
    if not shared:
        return cache, logits
    return model.fork_cache(cache, num_samples, max_new_tokens), jnp.repeat(logits, num_samples, axis=0)


def generate(
    model: CausalModel,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
    temperature: float | jax.Array = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    row_limits: jax.Array | None = None,
) -> Generation:
    """Sample completions; pure and jittable (close over `model` and the keyword options).

    Args:
      model: any causal model's functions.
      params: its parameters.
      prompts: left-padded `[B, P]`.
      key: consumed. The same key gives the same samples, a fresh key fresh ones.
      max_new_tokens: N; the result has `T = P + N` columns.
      eos_id: ends a row. It is part of the completion. None: rows end at their limit only.
      pad_id: fills the columns after the end. Masks come from lengths, so it may equal `eos_id`.
      temperature, top_k, top_p: see `sample_token`. Policy-gradient rollouts leave the filters off.
      samples_per_prompt: K; row `b * K + k` of the result is sample k of prompt b. A model that can fork its cache runs
        over each prompt once and holds it once.
      row_limits: `[B * K]` or None; most new tokens of each row, 1..N.

    Returns:
      `Generation` of `B * K` rows. `logprobs` agree with `token_logprobs` of the model's own training forward.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    cache, logits = _prefill(model, params, prompts, samples_per_prompt, max_new_tokens)
    prompts = jax.tree.map(lambda x: jnp.repeat(x, samples_per_prompt, axis=0), prompts)
    num_rows, prompt_length = prompts.tokens.shape
    limits = jnp.full((num_rows,), max_new_tokens) if row_limits is None else row_limits
    prompt_segments = prompts.mask.astype(jnp.int32)
    prompt_sizes = prompt_segments.sum(axis=1)

    def sample(logits: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        step_key = jax.random.fold_in(key, step)
        return sample_token(step_key, logits, temperature=temperature, top_k=top_k, top_p=top_p)

    def write(loop: _Loop, tokens: jax.Array, logprobs: jax.Array, cache: Cache) -> _Loop:
        live = ~loop.stopped
        ended = loop.ended if eos_id is None else loop.ended | (live & (tokens == eos_id))
        at = (0, loop.step)
        return _Loop(
            step=loop.step + 1,
            tokens=jax.lax.dynamic_update_slice(loop.tokens, jnp.where(live, tokens, pad_id)[:, None], at),
            logprobs=jax.lax.dynamic_update_slice(loop.logprobs, jnp.where(live, logprobs, 0.0)[:, None], at),
            mask=jax.lax.dynamic_update_slice(loop.mask, live[:, None], at),
            last=tokens,
            ended=ended,
            stopped=ended | (loop.step + 1 >= limits),
            cache=cache,
        )

    def decode(loop: _Loop) -> _Loop:
        positions = (prompt_sizes + loop.step - 1)[:, None]
        segments = (~loop.stopped).astype(jnp.int32)[:, None]
        hidden, cache = model.hidden(params, loop.last[:, None], positions, segments, loop.cache)
        return write(loop, *sample(model.unembed(params, hidden[:, -1]), loop.step), cache)

    loop = _Loop(
        step=jnp.zeros((), jnp.int32),
        tokens=jnp.full((num_rows, max_new_tokens), pad_id, prompts.tokens.dtype),
        logprobs=jnp.zeros((num_rows, max_new_tokens), jnp.float32),
        mask=jnp.zeros((num_rows, max_new_tokens), bool),
        last=jnp.full((num_rows,), pad_id, prompts.tokens.dtype),
        ended=jnp.zeros((num_rows,), bool),
        stopped=jnp.zeros((num_rows,), bool),
        cache=cache,
    )
    loop = write(loop, *sample(logits, loop.step), cache)
    decode = hoist(decode, loop)
    loop = jax.lax.while_loop(lambda x: (x.step < max_new_tokens) & ~jnp.all(x.stopped), decode, loop)
    no_prompt = jnp.zeros((num_rows, prompt_length))
    return Generation(
        tokens=jnp.concatenate([prompts.tokens, loop.tokens], axis=1),
        segment_ids=jnp.concatenate([prompt_segments, loop.mask.astype(jnp.int32)], axis=1),
        completion_mask=jnp.concatenate([no_prompt.astype(bool), loop.mask], axis=1),
        logprobs=jnp.concatenate([no_prompt, loop.logprobs], axis=1),
        ended=loop.ended,
    )

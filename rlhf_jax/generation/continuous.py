"""Continuous batching in one program: a row that has ended makes room for the next prompt of the queue.

A batch that waits for its longest row wastes the steps of all others. Here a fixed number of slots decodes side by side,
and as soon as enough of them are free, as many prompts are prefilled together and put there (iteration-level scheduling, Yu
et al. 2022, "Orca"). Rows that came at different times are still written at one column: the cache is a ring, and a prompt
is put just before the column that is next, so that a step costs what it costs in `generate`.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.generation.hoisting import hoist
from rlhf_jax.generation.sampling import sample_token
from rlhf_jax.models.picking import hidden_at, last_columns
from rlhf_jax.types import Cache, CausalModel, Generation, Params, PromptBatch


class _Queue(NamedTuple):
    """Carry of the loop: Q prompts, of which at most S are in a slot; N = most new tokens."""

    started: jax.Array  # [], prompts taken from the queue
    tokens: jax.Array  # [Q, N]
    logprobs: jax.Array  # [Q, N]
    sizes: jax.Array  # [Q], tokens sampled
    ended: jax.Array  # [Q], end of sequence emitted
    prompt: jax.Array  # [S], the slot's prompt; Q = free
    last: jax.Array  # [S], token written last
    cache: Cache


def generate_continuously(
    model: CausalModel,
    params: Params,
    prompts: PromptBatch,
    key: jax.Array,
    *,
    max_new_tokens: int,
    eos_id: int | None,
    pad_id: int,
    num_slots: int,
    refill_size: int | None = None,
    temperature: float | jax.Array = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    row_limits: jax.Array | None = None,
) -> Generation:
    """`generate` for completions of varied length; pure and jittable. The sampler of an iteration, for instance:

        sample = partial(generate_continuously, model, num_slots=32, max_new_tokens=128, eos_id=1, pad_id=0)
        iteration = make_ppo_iteration(sample, score, experience, update)

    Token t of prompt q is drawn with the key `fold_in(fold_in(key, q), t)`: which slot it is in, and beside whom, changes no
    sample (up to the rounding of a batch of another size). They are not the samples of `generate`, which has one key a step.

    Args:
      model: one with `refill_cache`.
      params: its parameters.
      prompts: left-padded `[Q, P]`, the queue; started in order.
      key: consumed.
      max_new_tokens: N.
      eos_id, pad_id, temperature, top_k, top_p: of `generate`.
      num_slots: rows decoded side by side; the cache has so many, of `P + N` columns.
      refill_size: so many prompts are prefilled together, once so many slots are free; fewer leaves fewer slots idle, more
        makes the prefill cheaper. None: an eighth of the slots.
      row_limits: `[Q]` or None; most new tokens of each prompt, 1..N.

    Returns:
      `Generation` of Q rows in the order of the queue, laid out as `generate`'s.

    Raises:
      ValueError: a model that cannot refill, or sizes that make no sense.
    """
    if model.refill_cache is None:
        raise ValueError("the model has no refill_cache; fix: use generate, or give the model one (see CausalModel)")
    num_slots = min(num_slots, prompts.tokens.shape[0])
    refill_size = max(1, num_slots // 8) if refill_size is None else min(refill_size, num_slots)
    if min(max_new_tokens, num_slots, refill_size) < 1:
        raise ValueError(
            f"max_new_tokens {max_new_tokens}, num_slots {num_slots} and refill_size {refill_size} must be at least 1"
        )
    num_prompts, prompt_length = prompts.tokens.shape
    limits = jnp.full((num_prompts,), max_new_tokens) if row_limits is None else row_limits
    segments = prompts.mask.astype(jnp.int32)
    prompt_sizes = segments.sum(axis=1)

    def sample(logits: jax.Array, prompt: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        def one(logits: jax.Array, prompt: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
            token_key = jax.random.fold_in(jax.random.fold_in(key, prompt), step)
            options = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
            token, logprob = sample_token(token_key, logits[None], **options)
            return token[0], logprob[0]

        return jax.vmap(one)(logits, prompt, step)

    def write(queue: _Queue, slots: jax.Array, prompt: jax.Array, logits: jax.Array, cache: Cache) -> _Queue:
        """One token each of the given slots, whose prompts are given; those of no prompt (Q) are written nowhere."""
        step = queue.sizes.at[prompt].get(mode="clip")
        tokens, logprobs = sample(logits, prompt, step)
        tokens = tokens.astype(queue.tokens.dtype)
        ended = jnp.zeros_like(tokens, bool) if eos_id is None else tokens == eos_id
        over = ended | (step + 1 >= limits.at[prompt].get(mode="clip"))
        return _Queue(
            started=queue.started,
            tokens=queue.tokens.at[prompt, step].set(tokens, mode="drop"),
            logprobs=queue.logprobs.at[prompt, step].set(logprobs, mode="drop"),
            sizes=queue.sizes.at[prompt].add(1, mode="drop"),
            ended=queue.ended.at[prompt].set(ended, mode="drop"),
            prompt=queue.prompt.at[slots].set(jnp.where(over, num_prompts, prompt)),
            last=queue.last.at[slots].set(tokens),
            cache=cache,
        )

    def refill(queue: _Queue) -> _Queue:
        slots = jnp.argsort(queue.prompt < num_prompts)[:refill_size]  # free ones first
        prompt = jnp.minimum(queue.started + jnp.arange(refill_size), num_prompts)
        tokens, ids = (x.at[prompt].get(mode="clip") for x in (prompts.tokens, segments))
        fresh = model.init_cache(refill_size, prompt_length)
        positions = positions_from_segments(ids)
        hidden, fresh = hidden_at(model, params, tokens, positions, ids, last_columns(1), fresh)
        cache = model.refill_cache(queue.cache, jnp.where(prompt < num_prompts, slots, num_slots), fresh)
        queue = queue._replace(started=jnp.minimum(queue.started + refill_size, num_prompts))
        return write(queue, slots, prompt, model.unembed(params, hidden[:, 0]), cache)

    def decode(queue: _Queue) -> _Queue:
        prompt = queue.prompt
        step = queue.sizes.at[prompt].get(mode="clip")
        positions = (prompt_sizes.at[prompt].get(mode="clip") + step - 1)[:, None]
        live = (prompt < num_prompts).astype(jnp.int32)[:, None]
        hidden, cache = model.hidden(params, queue.last[:, None], positions, live, queue.cache)
        return write(queue, jnp.arange(num_slots), prompt, model.unembed(params, hidden[:, -1]), cache)

    def may_decode(queue: _Queue) -> jax.Array:
        num_free = jnp.sum(queue.prompt == num_prompts)
        return (num_free < num_slots) & ((num_free < refill_size) | (queue.started == num_prompts))

    queue = _Queue(
        started=jnp.zeros((), jnp.int32),
        tokens=jnp.full((num_prompts, max_new_tokens), pad_id, prompts.tokens.dtype),
        logprobs=jnp.zeros((num_prompts, max_new_tokens), jnp.float32),
        sizes=jnp.zeros((num_prompts,), jnp.int32),
        ended=jnp.zeros((num_prompts,), bool),
        prompt=jnp.full((num_slots,), num_prompts, jnp.int32),
        last=jnp.full((num_slots,), pad_id, prompts.tokens.dtype),
        cache=model.init_cache(num_slots, prompt_length + max_new_tokens),
    )
    decode = hoist(decode, queue)
    # Two loops instead of a condition in one, whose branches would copy the cache.
    queue = jax.lax.while_loop(
        lambda queue: queue.started < num_prompts,
        lambda queue: jax.lax.while_loop(may_decode, decode, refill(queue)),
        queue,
    )
    mask = jnp.arange(max_new_tokens)[None] < queue.sizes[:, None]
    no_prompt = jnp.zeros((num_prompts, prompt_length))
    return Generation(
        tokens=jnp.concatenate([prompts.tokens, queue.tokens], axis=1),
        segment_ids=jnp.concatenate([segments, mask.astype(jnp.int32)], axis=1),
        completion_mask=jnp.concatenate([no_prompt.astype(bool), mask], axis=1),
        logprobs=jnp.concatenate([no_prompt, queue.logprobs], axis=1),
        ended=queue.ended,
    )

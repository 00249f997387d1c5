"""A policy's completions of whole data sets, their text, and what the embedded world's annotators make of it."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
import task
from task import TaskConfig

from rlhf_jax.data import chat
from rlhf_jax.data.records import Ranking
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.runtime.processes import on_every_host
from rlhf_jax.types import CausalModel, Generation, Params, PromptBatch


def sampler(
    config: TaskConfig,
    model: CausalModel,
    *,
    eos_id: int | None,
    pad_id: int,
    temperature: float = 1.0,
    num_samples: int = 1,
):
    """`sample(params, prompts, key) -> Generation` with this task's lengths; not jitted."""

    def sample(params: Params, prompts: PromptBatch, key: jax.Array) -> Generation:
        return generate(
            model,
            params,
            prompts,
            key,
            max_new_tokens=config.response_length,
            eos_id=eos_id,
            pad_id=pad_id,
            temperature=temperature,
            samples_per_prompt=num_samples,
        )

    return sample


@functools.cache
def jitted_sampler(
    config: TaskConfig,
    network: TransformerConfig,
    eos_id: int | None,
    pad_id: int,
    num_samples: int = 1,
    temperature: float = 1.0,
):
    """`sampler` jitted; equal arguments share one compilation."""
    model, options = transformer.causal_model(network), {"temperature": temperature, "num_samples": num_samples}
    return jax.jit(sampler(config, model, eos_id=eos_id, pad_id=pad_id, **options))


def sample_all(sample_fn, params: Params, prompts: PromptBatch, key: jax.Array, *, batch_size: int) -> Generation:
    """Sample for all prompts, `batch_size` of them at a time; results on the host.

    A last, smaller batch is filled with copies of its first prompt, which are then thrown away: one compilation.
    """
    num_prompts, parts = prompts.tokens.shape[0], []
    for start in range(0, num_prompts, batch_size):
        rows = np.arange(start, start + batch_size)
        rows = np.where(rows < num_prompts, rows, start)
        batch = jax.tree.map(lambda x, rows=rows: jnp.asarray(np.asarray(x)[rows]), prompts)
        sampled = jax.tree.map(on_every_host, sample_fn(params, batch, jax.random.fold_in(key, start)))
        per_prompt = sampled.tokens.shape[0] // batch_size
        keep = min(batch_size, num_prompts - start) * per_prompt
        parts.append(jax.tree.map(lambda x, keep=keep: x[:keep], sampled))
    return jax.tree.map(lambda *arrays: np.concatenate(arrays), *parts)


def completions(tokenizer: Tokenizer, generation: Generation) -> list[str]:
    """The text of each completion. An id that only a padded embedding has, and no text, shows as U+FFFD."""

    def text(ids: list[int]) -> str:
        runs = itertools.groupby(ids, lambda i: i < tokenizer.vocab_size)
        return "".join(
            chat.decode_completion(tokenizer, list(run)) if known else "\ufffd" * len(list(run)) for known, run in runs
        )

    tokens, masks = np.asarray(generation.tokens), np.asarray(generation.completion_mask)
    return [text(row[mask].tolist()) for row, mask in zip(tokens, masks, strict=True)]


def collect_rankings(
    config: TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    policy: Params,
    questions: Sequence[str],
    *,
    num_responses: int,
    seed: int,
) -> list[Ranking]:
    """The human step of the embedded world: sample K responses to each question, have them ranked."""
    sample = jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id, num_responses)
    prompts = task.prompt_rows(config, tokenizer, task.world_prompts(questions))
    sampled = sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=128)
    texts = completions(tokenizer, sampled)
    groups = [texts[i : i + num_responses] for i in range(0, len(texts), num_responses)]
    return task.world_rankings(questions, groups, seed=seed)

"""Several answers of a policy to each held-out prompt, scored: what `evaluate.py` and the best-of-n curve are computed from."""

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import kept_reward
import numpy as np
import report
import sampling
import task
from scoring import in_parts, row_logprobs, row_sums, score_rows

import rlhf_jax as rl
from rlhf_jax.data.records import Prompt
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.functional.rewards import normalize_scores, subtract_missing_eos
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.training.evaluate import token_kl
from rlhf_jax.types import Generation, Params

ROWS = 1024
"""Completions sampled at a time."""


class Model(NamedTuple):
    """A network and its parameters."""

    network: TransformerConfig
    params: Params


class Reward(NamedTuple):
    """A reward model, and the moments of its scores on samples of the baseline."""

    model: Model
    mean: float
    std: float
    missing_eos_penalty: float

    def scores(self, generation: Generation) -> np.ndarray:
        """Z-scores less the penalty, as act 3 optimises them."""
        raw = score_rows(*self.model, generation.tokens, generation.segment_ids)
        standard = normalize_scores(jnp.asarray(raw), mean=self.mean, std=self.std)
        penalty = self.missing_eos_penalty
        return np.asarray(subtract_missing_eos(standard, jnp.asarray(generation.ended), penalty=penalty))


class Answers(NamedTuple):
    """K answers to each of N prompts; rows of `generation` and `texts` in groups of K."""

    generation: Generation
    texts: list[str]
    scores: np.ndarray  # [N, K]
    sizes: np.ndarray  # [N, K], tokens
    gold: np.ndarray | None  # [N, K], where a true utility is known

    @property
    def groups(self) -> list[list[list[int]]]:
        """Token ids of every completion, by prompt."""
        rows = zip(self.generation.tokens, self.generation.completion_mask, strict=True)
        flat = [tokens[mask].tolist() for tokens, mask in rows]
        size = self.scores.shape[1]
        return [flat[i : i + size] for i in range(0, len(flat), size)]


def collect(
    config: task.TaskConfig,
    tokenizer: Tokenizer,
    policy: Model,
    reward: Reward,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    temperature: float,
    seed: int,
) -> Answers:
    """Sample and score; the true utility is the embedded world's, and None for `--data`."""
    ids = (tokenizer.eos_id, tokenizer.pad_id)
    sample = sampling.jitted_sampler(config, policy.network, *ids, num_samples, temperature)
    rows = task.prompt_rows(config, tokenizer, prompts)
    size = max(min(ROWS // num_samples, len(prompts)), 1)
    generation = sampling.sample_all(sample, policy.params, rows, jax.random.key(seed), batch_size=size)
    texts, gold, shape = sampling.completions(tokenizer, generation), None, (len(prompts), num_samples)
    if config.data is None:
        questions = [record.prompt[0].content for record in prompts for _ in range(num_samples)]
        gold = np.array([report.gold(q, text) for q, text in zip(questions, texts, strict=True)]).reshape(shape)
    sizes = generation.completion_mask.sum(axis=1).reshape(shape)
    return Answers(generation, texts, reward.scores(generation).reshape(shape), sizes, gold)


def divergences(policy: Model, reference: Model, answers: Answers, *, temperature: float) -> dict[str, np.ndarray]:
    """Nats per completion `[N, K]`: `exact` sums each token's own KL, `k1` the log-ratios of the tokens drawn."""
    generation = answers.generation
    tokens, segment_ids, mask = generation.tokens, generation.segment_ids, generation.completion_mask
    of_rows = functools.partial(
        _jitted_kl(policy.network, reference.network, temperature), policy.params, reference.params
    )
    exact = in_parts(of_rows, tokens, segment_ids)
    k1 = generation.logprobs - row_logprobs(*reference, tokens, segment_ids, temperature=temperature)
    return {name: row_sums(x, mask).reshape(answers.scores.shape) for name, x in (("exact", exact), ("k1", k1))}


def reward_of_run(run: Path, network: TransformerConfig, tokenizer: Tokenizer, *, missing_eos_penalty: float) -> Reward:
    """Act 2's reward model."""
    params, mean, std = kept_reward.load(run, network, tokenizer)
    return Reward(Model(network, params), mean, std, missing_eos_penalty)


@functools.cache
def _jitted_kl(network: TransformerConfig, reference_network: TransformerConfig, temperature: float):
    model, reference = rl.causal_model(network), rl.causal_model(reference_network)

    def of_rows(params: Params, reference_params: Params, tokens: jax.Array, segment_ids: jax.Array) -> jax.Array:
        return token_kl((model, params), (reference, reference_params), tokens, segment_ids, temperature=temperature)

    return jax.jit(of_rows)

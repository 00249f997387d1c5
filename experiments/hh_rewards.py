"""Act 2 of the HH job: reward models, judges, and reward models that learn shuffled labels."""

import functools
from functools import partial

import hh_data
import jax
import jax.numpy as jnp
import kept_reward
import numpy as np
import sampling
import scipy.optimize
import sft
from hh_config import Job
from hh_data import DOMAINS, HHData
from scoring import in_parts, score_rows

from rlhf_jax.functional.masking import masked_mean
from rlhf_jax.functional.reward_losses import bradley_terry_loss
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.objectives import policy_hidden
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.types import Generation, Params, RankingBatch


def play(job: Job, data: HHData) -> None:
    """Reward models on half A, judges on half B, shuffled labels of half A; for the accuracy table, `long_*` on half A.

    All but the last are blind to length: they compare the same number of tokens and see no end.
    """
    sampled = reference_samples(job, data)
    for domain in DOMAINS:
        half_a, half_b = (hh_data.differing(job.hh, data, data.of(part, domains=[domain])) for part in ("a", "b"))
        rows = hh_data.matched_rows(job.hh, data, half_a)
        fit(job, domain, rows, sampled)
        fit(job, f"judge_{domain}", hh_data.matched_rows(job.hh, data, half_b), sampled)
        long = hh_data.ranking_rows(job.hh, data, half_a, length=job.hh.long_length)
        fit(job, f"long_{domain}", long, None)
    for i in range(job.hh.num_shuffled):
        half_a = hh_data.differing(job.hh, data, data.of("a", domains=[DOMAINS[i % 2]]))
        rows = hh_data.matched_rows(job.hh, data, half_a)
        rng = np.random.default_rng([job.seed, i])
        shuffled = rows.replace(ranks=rng.permuted(rows.ranks, axis=1))
        fit(job, f"shuffled_{i}", shuffled, sampled)


def reference_samples(job: Job, data: HHData) -> Generation:
    """The SFT policy's replies to 512 training prompts: there, scores get mean 0 and standard deviation 1."""
    tokenizer, network, policy = sft.load(job.run)
    prompts = hh_data.prompt_rows(job.hh, data, data.of("a", "b"))
    prompts = jax.tree.map(lambda x: x[np.linspace(0, len(x) - 1, min(512, len(x)), dtype=int)], prompts)
    sample = sampling.jitted_sampler(
        job.hh.lengths, network, None, tokenizer.pad_id, temperature=job.hh.ppo.temperature
    )
    return sampling.sample_all(sample, policy, prompts, jax.random.key(job.seed), batch_size=256)


def fit(job: Job, name: str, rows: RankingBatch, sampled: Generation | None) -> None:
    """Fit one reward model's head, unless it is there; save it with its moments on `sampled`.

    A score is the head's mean over the reply's tokens. 800 comparisons are few for a whole network, so the trunk stays the
    SFT policy's, and the head minimises the mean Bradley-Terry loss + l2 / 2 |w|², in units of the features' spread.
    """
    folder = job.run / "rewards" / name
    if checkpoint.latest_step(folder / "reward_model") is not None:
        return
    tokenizer, network, policy = sft.load(job.run)
    inputs = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segment_ids, rows.completion_mask))
    with MetricLog(job.run / "metrics.jsonl", f"rm_{name}", 1, show={"rm/accuracy": "accuracy"}) as log:
        features = mean_hidden_states(network, policy, *inputs).reshape(-1, 2, network.model_dim)
        gaps = (features[:, 0] - features[:, 1]) * np.sign(rows.ranks[:, 1] - rows.ranks[:, 0])[:, None]
        scale = gaps.std()
        loss = partial(_loss_and_gradient, job.hh.reward.l2, gaps / scale)
        fitted = scipy.optimize.minimize(loss, np.zeros(network.model_dim), jac=True, method="L-BFGS-B")
        metrics = {"rm/loss": fitted.fun, "rm/accuracy": float(np.mean(gaps @ fitted.x > 0))}
        log.write(0, metrics, tokens=rows.tokens.size)
    weight = jnp.asarray(fitted.x / scale, jnp.float32)
    params = {"trunk": policy, "head": {"weight": weight, "bias": jnp.zeros(())}}
    mean, std = 0.0, 1.0
    if sampled is not None:
        scores = score_rows(network, params, sampled.tokens, sampled.segment_ids, sampled.completion_mask)
        mean, std = float(scores.mean()), float(scores.std())
    kept_reward.save(folder, params, tokenizer, mean=mean, std=std)


@functools.cache
def _jitted_features(network: TransformerConfig):
    model = transformer.causal_model(network)

    def features(params: Params, tokens: jax.Array, segment_ids: jax.Array, mask: jax.Array) -> jax.Array:
        hidden = policy_hidden(model, params, tokens, segment_ids)
        return jax.vmap(lambda x: masked_mean(x, mask, axis=1), in_axes=-1, out_axes=-1)(hidden)

    return jax.jit(features)


def mean_hidden_states(network: TransformerConfig, params: Params, *inputs: np.ndarray) -> np.ndarray:
    """Hidden states `[N, D]`, averaged over the completion."""
    return in_parts(partial(_jitted_features(network), params), *inputs).astype(np.float64)


@partial(jax.jit, static_argnums=0)
def _regularised(l2: float, gaps: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    def loss(w: jax.Array) -> jax.Array:
        return bradley_terry_loss(gaps @ w, jnp.zeros(len(gaps))).mean() + l2 / 2 * (w @ w)

    return jax.value_and_grad(loss)(weight)


def _loss_and_gradient(l2: float, gaps: np.ndarray, weight: np.ndarray) -> tuple[float, np.ndarray]:
    value, gradient = _regularised(l2, gaps.astype(np.float32), weight.astype(np.float32))
    return float(value), np.asarray(gradient, np.float64)

"""Several reward models from one start, each on rankings drawn anew with replacement; and what their rewards are worth.

`reward_model.py --reward.ensemble M` trains them in one `vmap`. All start from the SFT policy and one and the same head, so
that their mean weights are a network (WARM, Ramé et al. 2024): that one is the run's reward model, which act 3 takes up. The
members themselves are kept in `reward_ensemble`, for `make_ensemble_score_fn` with the mean, WCO or UWO (Coste et al. 2023,
whose members differ by their heads as well).

Measured, three members, one epoch, seed 0, 254 s on two CPU cores beside other work: the members order .709 to .717 of the
held-out pairs rightly, their mean .734, UWO .731, WCO .719, WARM .701 (each ±.017): at a learning rate for small networks from
a random start, averaging weights costs accuracy instead of adding some.
"""

import functools
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import kept_reward
import meshes
import numpy as np
import sampling
from acts import facts, num_steps_of
from jax.sharding import NamedSharding, PartitionSpec
from meshes import COPIES, MeshConfig
from scoring import in_parts, score_rows
from task import TaskConfig

from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.functional import ensemble_mean, normalize_members, ordered_pairs, uncertainty_weighted, worst_case
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import ensemble_scores, init_reward_head
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import guarded
from rlhf_jax.training.ensembles import average_members, init_ensemble, make_ensemble_step, member_indices
from rlhf_jax.training.evaluate import Interval, proportion_interval
from rlhf_jax.training.optimizers import adam_optimizer, warmup_cosine
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Objective, Params, PromptBatch, RankingBatch, TrainState

RULES = {"mean": ensemble_mean, "WCO": worst_case, "UWO": uncertainty_weighted}


def train(
    config,
    network: TransformerConfig,
    objective: Objective,
    trunk: Params,
    data: RankingBatch,
    *,
    seed: int,
    keep: Callable,
    mesh: MeshConfig = COPIES,
) -> Params:
    """Fit `config.ensemble` members (a `RewardModelConfig`); their stacked parameters. `keep` is `task.keeper`'s."""
    num_prompts, num_members = data.tokens.shape[0], config.ensemble
    num_steps = num_steps_of(config, num_prompts, "rankings")
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    member_steps = make_ensemble_step(make_train_step(objective, optimizer, num_micro_batches=config.num_micro_batches))
    start = {"trunk": trunk, "head": init_reward_head(jax.random.key(seed), network.model_dim)}

    def step_fn(states, rows, data):
        states, metrics = member_steps(states, data, rows)
        means = {name: value.mean() for name, value in metrics.items()}
        return states, {**means, "grad/finite": metrics["grad/finite"].min()}

    step_fn = jax.jit(guarded(step_fn), donate_argnums=0)
    init_fn = partial(_start_alike, optimizer=optimizer, num_members=num_members)
    if meshes.is_split(mesh):
        member = jax.eval_shape(partial(init_train_state, optimizer=optimizer), start)
        member = meshes.like(member, kept_reward.specs_of(network), mesh)
        init_fn = jax.jit(init_fn, out_shardings=jax.tree.map(_stacked, member))
    states = init_fn(start, jax.random.key(seed))
    show, same = {"rm/loss": "loss", "rm/accuracy": "accuracy"}, facts(config, seed=seed, data=data, start=trunk)
    everything = jax.device_put(data)
    with (
        keep("reward_model", states, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, "reward_model", num_steps, show=show, first_step=kept.first_step) as log,
    ):
        states = kept.state
        sizes = {"num_members": num_members, "num_examples": num_prompts, "batch_size": config.batch_size}
        for step in range(kept.first_step, num_steps):
            rows = kept.batch(step, member_indices(seed, step, bootstrap=True, **sizes))
            states, metrics = step_fn(states, rows, everything)
            tokens = rows.size * data.tokens[0].size
            log.write(step, kept.check(step, states, metrics, rows), tokens=tokens)
            kept.finish(step, states)
    return states.params


def _start_alike(start: Params, key: jax.Array, **options) -> TrainState:
    return init_ensemble(lambda key: start, key, **options)


def _stacked(member: jax.ShapeDtypeStruct) -> NamedSharding:
    """Where all members' arrays lie, one on the other: each where one member's does."""
    return NamedSharding(member.sharding.mesh, PartitionSpec(None, *member.sharding.spec))


def member_scores(
    network: TransformerConfig, params: Params, tokens: np.ndarray, segment_ids: np.ndarray
) -> np.ndarray:
    """Raw scores `[M, N]` of whole rows."""
    return in_parts(partial(_jitted_scores(network), params), tokens, segment_ids).T


@functools.cache
def _jitted_scores(network: TransformerConfig):
    model = transformer.causal_model(network)
    return jax.jit(lambda params, *rows: ensemble_scores(model, params, *rows).T)


def finish(
    config: TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    policy: Params,
    params: Params,
    prompts: PromptBatch,
    held_out: RankingBatch,
) -> None:
    """Keep the members, with the moments of each one's scores on fresh samples of the SFT policy, and say what they know."""
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id)
    sampled = sampling.sample_all(sample, policy, prompts, jax.random.key(config.seed), batch_size=256)
    raw = member_scores(network, params, sampled.tokens, sampled.segment_ids)
    means, stds = raw.mean(axis=1), raw.std(axis=1)
    notes = {"means": means.tolist(), "stds": stds.tolist(), "tokenizer": tokenizer.fingerprint}
    checkpoint.save(config.run / "reward_ensemble", 0, params, notes=notes)
    for name, share in accuracies(network, params, (means, stds), held_out).items():
        print(f"{name:9} {share} of {share.n} held-out pairs")


def accuracies(
    network: TransformerConfig, params: Params, moments: tuple[np.ndarray, np.ndarray], data: RankingBatch
) -> dict[str, Interval]:
    """Share of ordered pairs that each member, each rule and the mean weights get right; intervals over pairs."""
    flat = (-1, data.tokens.shape[-1])
    rows = [np.asarray(x).reshape(flat) for x in (data.tokens, data.segment_ids)]
    raw = member_scores(network, params, *rows)
    normal = normalize_members(jnp.asarray(raw), *(jnp.asarray(x) for x in moments))
    scores = {f"member {i}": x for i, x in enumerate(raw)}
    scores |= {name: np.asarray(rule(normal)) for name, rule in RULES.items()}
    scores["WARM"] = score_rows(network, average_members(params), *rows)
    better = np.asarray(ordered_pairs(jnp.asarray(data.ranks), jnp.asarray(data.mask)))

    def share(scores: np.ndarray) -> Interval:
        by_prompt = scores.reshape(data.mask.shape)
        gaps = (by_prompt[:, :, None] - by_prompt[:, None, :])[better]
        return proportion_interval((gaps > 0) + 0.5 * (gaps == 0))

    return {name: share(x) for name, x in scores.items()}

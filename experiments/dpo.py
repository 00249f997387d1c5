"""Direct preference optimisation and its relatives: a policy from comparisons, without a reward model or sampling.

    python experiments/dpo.py --run runs/mine --dpo.method simpo

takes up `runs/mine/sft`, has the annotators rank K of its responses to each question, as act 2 does, and writes
`runs/mine/METHOD`. With `--data FILE` it learns from the rankings or pairs of that file. `--dpo.num-rounds R` repeats it: the
policy of a round answers other questions, its answers are ranked, and it learns from them (iterative DPO; Xiong et al. 2023).
What a method is stands in `dpo_methods.py`. Deviation from the papers: a learning rate hundreds of times higher, for a small
network.

Measured, DPO in three rounds after `rlhf.py` at seed 0, on two CPU cores beside other work: with the first reference it wins
84.2 [80.8, 87.1] % against SFT at 1.2 nats (832 s), with the previous one 90.5 [87.7, 92.8] % at 2.3 nats (648 s).
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import judge
import meshes
import sampling
import sft
import task
import tyro
from acts import alone, facts, is_played, note_command, num_steps_of
from dpo_methods import DPOConfig, build_objective
from meshes import COPIES, MeshConfig
from scoring import row_logprobs

import rlhf_jax as rl
from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.records import Ranking
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.training.optimizers import warmup_cosine
from rlhf_jax.types import Params

SHOW = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """The run."""

    dpo: DPOConfig = DPOConfig()


def ranked_answers(
    config: Config, network: rl.TransformerConfig, tokenizer: Tokenizer, policy: Params, number: int
) -> list[Ranking]:
    """K responses of the policy to the questions of a round, ranked by the annotators; the first round's are act 2's."""
    records = task.load_prompts(config)[0]
    start = number * task.NUM_RANKINGS % len(records)
    questions = [record.prompt[0].content for record in [*records[start:], *records[:start]][: task.NUM_RANKINGS]]
    settings = {"num_responses": config.dpo.num_responses, "seed": config.seed + 10_000 * number}
    return sampling.collect_rankings(config, network, tokenizer, policy, questions, **settings)


def as_batch(
    config: Config,
    network: rl.TransformerConfig,
    tokenizer: Tokenizer,
    rankings: Sequence[Ranking],
    reference: Params,
):
    """Pairs (for KTO, completions) with the reference's log-probs, which are computed here once."""
    most = max(len(record.responses) for record in rankings)
    batch = rl.ranked_pairs(task.ranking_rows(config, tokenizer, rankings, num_responses=most))
    if config.dpo.method == "kto":
        batch = rl.labelled_rows(batch, pad_id=tokenizer.pad_id)
    flat = (-1, batch.tokens.shape[-1])
    ref = row_logprobs(network, reference, batch.tokens.reshape(flat), batch.segment_ids.reshape(flat))
    return batch.replace(ref_logprobs=ref.reshape(batch.tokens.shape))


def train(
    config: DPOConfig,
    network: rl.TransformerConfig,
    policy: Params,
    data,
    *,
    seed: int,
    keep: Callable,
    stage: str,
    mesh: MeshConfig = COPIES,
) -> Params:
    """Fit the policy, from `policy` on, to the pairs; `keep` is `task.keeper`'s."""
    num_rows = len(data.tokens)
    num_steps = num_steps_of(config, num_rows, "pairs")
    optimizer = rl.adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    objective = build_objective(config, network, task.shared_prompts(config, data))
    step_fn = rl.make_train_step(objective, optimizer, num_micro_batches=config.num_micro_batches)
    step_fn, devices = jax.jit(guarded(step_fn), donate_argnums=0), meshes.mesh_of(mesh)
    state = rl.init_train_state(jax.tree.map(lambda x: x.copy(), policy), optimizer)
    state = meshes.put(state, rl.transformer.param_specs(network), mesh)
    same = facts(config, seed=seed, data=data, start=policy)
    with (
        keep(stage, state, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, stage, num_steps, show=SHOW, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, num_steps):
            rows = batch_indices(seed, step, num_examples=num_rows, batch_size=config.batch_size)
            batch = kept.batch(step, rl.shard_batch(jax.tree.map(lambda x, rows=rows: x[rows], data), devices))
            state, metrics = step_fn(state, batch)
            log.write(step, kept.check(step, state, metrics, batch), tokens=batch.tokens.size)
            kept.finish(step, state)
    return state.params


def main(config: Config) -> None:
    """Learn from the comparisons, save the policy, say what held-out pairs and the world's judge think of it."""
    run, settings = config.run, config.dpo
    part = settings.batch_size // settings.num_micro_batches
    meshes.check(config.mesh, rows={"--dpo.batch-size / --dpo.num-micro-batches": part})
    if config.data is not None and settings.num_rounds > 1:
        raise SystemExit(
            "nobody ranks new answers to the prompts of a file; nothing was started; fix: --dpo.num-rounds 1"
        )
    if is_played(run, settings.method, resume=config.resume):
        return
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    if config.data is None:
        unseen = judge.rankings_of_policy(config, run, num_responses=settings.num_responses, held_out=True)
    else:
        rankings, unseen = task.load_rankings(config)
    held_out = as_batch(config, network, tokenizer, unseen, policy)
    params, stages = policy, [settings.method, *(f"{settings.method}_round_{i}" for i in range(1, settings.num_rounds))]
    for number, stage in enumerate(stages):
        if config.data is None:
            rankings = ranked_answers(config, network, tokenizer, params, number)
        reference = policy if settings.reference == "first" else params
        data = as_batch(config, network, tokenizer, rankings, reference)
        options = {"seed": config.seed + number, "keep": task.keeper(config), "stage": stage, "mesh": config.mesh}
        params = train(settings, network, params, data, **options)
        if number < settings.num_rounds - 1:
            print(f"round {number + 1}: {judge.gold_line(config, run, params)}")
    checkpoint.save(run / settings.method, 0, params, notes={"tokenizer": tokenizer.fingerprint})
    for stage in stages:
        forget(run, stage)
    result = rl.evaluate(build_objective(settings, network))(params, sft.batches(held_out, 64))
    print("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in sorted(result.items())))
    if config.data is None:
        print(judge.gold_line(config, run, params))
    print(f"policy saved in {run / settings.method}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)

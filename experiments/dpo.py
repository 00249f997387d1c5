"""Direct preference optimisation and its relatives: a policy from comparisons, without a reward model or sampling.

    python experiments/dpo.py --run runs/mine --dpo.method simpo

takes up `runs/mine/sft`, has the annotators rank K of its responses to each question, as act 2 does, and writes
`runs/mine/METHOD`. With `--data FILE` it learns from the rankings or pairs of that file. Two CPU cores, about a minute. What
a method is stands in `METHODS`. Deviation from the papers: a learning rate hundreds of times higher, for a network so small.
"""

import dataclasses
from pathlib import Path
from typing import Literal

import grpo
import jax
import judge
import sft
import task
import tyro
from acts import note_command, num_steps_of, refuse_again
from scoring import row_logprobs

import rlhf_jax as rl
from rlhf_jax.data.batching import batch_indices
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.training.optimizers import warmup_cosine
from rlhf_jax.types import Params

METHODS = {
    "dpo": (rl.dpo_loss, {}),
    "robust_dpo": (rl.robust_dpo_loss, {}),
    "ipo": (rl.ipo_loss, {}),
    "ipo_means": (rl.ipo_loss, {"inputs_fn": rl.mean_against_reference}),
    "orpo": (rl.orpo_loss, {"inputs_fn": rl.mean_per_token}),
    "simpo": (rl.simpo_loss, {"inputs_fn": rl.mean_per_token}),
    "cpo": (rl.cpo_loss, {"inputs_fn": rl.sums_and_nll}),
    "kto": (rl.kto_loss, {}),
}
"""Name to loss, and to what it is told."""

SHOW = {"loss": "loss", "rewards/margins": "margin", "rewards/accuracies": "accuracy"}


@dataclasses.dataclass(frozen=True)
class DPOConfig:
    """Numbers of the run."""

    method: Literal["dpo", "robust_dpo", "ipo", "ipo_means", "orpo", "simpo", "cpo", "kto"] = "dpo"
    beta: float = 0.5
    """0.1 in Rafailov et al. 2023; with all pairs of 4,096 rankings that lets this small policy run from its text. It means
    another strength in every method; SimPO's is 2 to 2.5."""
    nll_coef: float = 0.0
    """Weight of the chosen completion's likelihood."""
    num_epochs: float = 1.0
    batch_size: int = 64
    """Pairs; for KTO, completions."""
    num_micro_batches: int = 1
    learning_rate: float = 1e-4
    num_responses: int = 4
    """K, in the embedded world; all ordered pairs of a question's K responses are used."""


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """The run."""

    dpo: DPOConfig = DPOConfig()


def build_objective(config: DPOConfig, network: rl.TransformerConfig):
    """The method's objective."""
    model, (loss_fn, options) = rl.causal_model(network), METHODS[config.method]
    if config.method == "kto":
        return rl.labelled_preference(model, loss_fn, beta=config.beta)
    return rl.preference(model, loss_fn, beta=config.beta, nll_coef=config.nll_coef, **options)


def load_data(config: Config, run: Path):
    """Training and held-out batches with the SFT policy's log-probs, which are computed here once."""
    tokenizer, network, policy = sft.load(run)
    sides = (
        task.load_rankings(config)
        if config.data
        else [
            judge.rankings_of_policy(config, run, num_responses=config.dpo.num_responses, held_out=held_out)
            for held_out in (False, True)
        ]
    )
    batches = []
    for rankings in sides:
        most = max(len(record.responses) for record in rankings)
        batch = rl.ranked_pairs(task.ranking_rows(config, tokenizer, rankings, num_responses=most))
        if config.dpo.method == "kto":
            batch = rl.labelled_rows(batch, pad_id=tokenizer.pad_id)
        flat = (-1, batch.tokens.shape[-1])
        ref = row_logprobs(network, policy, batch.tokens.reshape(flat), batch.segment_ids.reshape(flat))
        batches.append(batch.replace(ref_logprobs=ref.reshape(batch.tokens.shape)))
    return batches


def train(config: DPOConfig, network: rl.TransformerConfig, policy: Params, data, *, seed: int, log_to: Path) -> Params:
    """Fit the policy, from `policy` on, to the pairs."""
    num_rows = len(data.tokens)
    num_steps = num_steps_of(config, num_rows, "pairs")
    optimizer = rl.adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    step_fn = rl.make_train_step(
        build_objective(config, network), optimizer, num_micro_batches=config.num_micro_batches
    )
    step_fn, mesh = jax.jit(step_fn, donate_argnames="state"), rl.make_mesh()
    state = rl.init_train_state(jax.tree.map(lambda x: x.copy(), policy), optimizer)
    with MetricLog(log_to, config.method, num_steps, show=SHOW) as log:
        for step in range(num_steps):
            rows = batch_indices(seed, step, num_examples=num_rows, batch_size=config.batch_size)
            batch = rl.shard_batch(jax.tree.map(lambda x, rows=rows: x[rows], data), mesh)
            state, metrics = step_fn(state, batch)
            log.write(step, metrics, tokens=batch.tokens.size)
    return state.params


def main(config: Config) -> None:
    """Learn from the comparisons, save the policy, say what held-out pairs and the world's judge think of it."""
    run, settings = config.run, config.dpo
    refuse_again(run / settings.method)
    tokenizer, network, policy = sft.take_up(config)
    note_command(run)
    data, held_out = load_data(config, run)
    params = train(settings, network, policy, data, seed=config.seed, log_to=run / "metrics.jsonl")
    checkpoint.save(run / settings.method, 0, params, notes={"tokenizer": tokenizer.fingerprint})
    result = rl.evaluate(build_objective(settings, network))(params, sft.batches(held_out, 64))
    print("held out: " + ", ".join(f"{name} {value:.3f}" for name, value in sorted(result.items())))
    if config.data is None:
        print(grpo.gold_line(config, run, params))
    print(f"policy saved in {run / settings.method}")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

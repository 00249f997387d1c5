"""Verifiable rewards on GSM8K (Cobbe et al. 2021): a group method, with Python functions in the reward model's place.

    python experiments/gsm8k.py --model DIRECTORY --data-dir DATA --run runs/gsm8k

starts from any model directory, trains on `DATA/verifiable/gsm8k_train.jsonl.gz`, and says which share of held-out questions
of `gsm8k_test` the policy answers, greedily, before and after (`samples.jsonl` has every answer). Reward: 1 for the right
final number, `form_weight` for ending in `#### NUMBER`. Expected: what the model allows; the storyteller of 260,000 parameters
(`convert_llama2c.py`) solves none, before and after, and no larger one has been tried. Deviations from Shao et al. 2024: no
instruction tuning before, no reward model, only GSM8K's questions. DAPO has no overlong penalty here, and resamples nothing.
"""

import dataclasses
import os
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import sampling
import sft
import task
import tyro
from acts import facts, is_played, keep_programs, note_command, refuse_mesh, refuse_processes
from grpo_methods import GRPOConfig
from gsm8k_iteration import build
from gsm8k_problems import Problems, answer_rows, load, score, shares

import rlhf_jax as rl
from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.resume import forget
from rlhf_jax.runtime.runs import locked, open_run, read_json_lines, write_json, write_json_lines
from rlhf_jax.types import Params

SHOW = {"reward/exact": "right", "reward/form": "form", "objective/kl": "KL", "response/len_mean": "length"}


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """The numbers of this job."""

    run: Path = Path("runs/gsm8k")
    data_dir: Path | None = Path(os.environ["RLHF_JAX_DATA"]) if "RLHF_JAX_DATA" in os.environ else None
    """Folder with `verifiable/gsm8k_*.jsonl.gz`: `id`, `prompt`, `answer`."""
    instruction: str = "\nReason step by step. End with #### and the number."
    """Follows every question."""
    prompt_length: int = 256
    """Tokens, the instruction included; longer questions are left out."""
    response_length: int = 256
    num_held_out: int = 256
    """Questions of the test set, its first ones that are short enough."""
    form_weight: float = 0.1
    time_limit: float = 10.0
    """Seconds for the rewards of a batch."""
    mask_failures: bool = False
    """Leave completions out whose reward fails, in place of stopping."""
    grpo: GRPOConfig = GRPOConfig(
        num_iterations=200, num_prompts=32, group_size=8, num_epochs=1, learning_rate=2e-6, kl_coef=0.01
    )


def lengths_of(config: Config) -> task.TaskConfig:
    """What a sampler reads of the configuration, and nothing that differs from run to run."""
    return task.TaskConfig(prompt_length=config.prompt_length, response_length=config.response_length)


def train(config: Config, tokenizer: Tokenizer, network: rl.TransformerConfig, policy: Params, problems: Problems):
    """Roll out, score on the host, learn; returns the trained parameters."""
    settings, name, mesh, root = config.grpo, config.grpo.method, rl.make_mesh(), jax.random.key(config.seed)
    options = {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id}
    optimizer, sample, reference, experience, update = build(settings, lengths_of(config), network, **options)
    weights = jnp.asarray([1.0, config.form_weight])
    limits = {"time_limit": config.time_limit, "mask_failures": config.mask_failures}
    state, step = rl.init_ppo_state(policy, None, optimizer, kl_coef=settings.kl_coef), 0
    same = facts(settings, seed=config.seed, data=problems.prompts, start=policy)
    folder = config.run / "state" / name
    try:
        with (
            task.keeper(config)(name, state, save_every=settings.save_every, facts=same) as kept,
            MetricLog(kept.log_to, name, settings.num_iterations, show=SHOW, first_step=kept.first_step) as log,
        ):
            state = kept.state
            for step in range(kept.first_step, settings.num_iterations):
                rows = batch_indices(config.seed, step, num_examples=len(problems.ids), batch_size=settings.num_prompts)
                batch = jax.tree.map(lambda x, rows=rows: x[rows], problems.prompts)
                batch = kept.batch(step, rl.shard_batch(batch, mesh))
                sample_key, update_key = jax.random.split(jax.random.fold_in(root, step))
                generation = sample(state.params["policy"], batch, sample_key)
                ref_logprobs = reference(policy, generation)  # devices compute them while the host rewards
                texts = sampling.completions(tokenizer, generation)
                each = np.repeat(rows, settings.group_size)
                scored = score(problems, each, texts, where=f"{name} step {step}", **limits)
                total = rl.weighted_sum(jnp.asarray(scored.scores), weights, jnp.asarray(scored.mask))
                total = rl.fill_missing(total, jnp.asarray(scored.rows), group_size=settings.group_size)
                data, rollout = experience(state, ref_logprobs, generation, total, jnp.asarray(scored.rows))
                state, learned = update(state, data, None, rollout["objective/kl"], update_key)
                metrics = kept.check(step, state, {**rollout, **scored.metrics, **learned}, batch)
                log.write(step, metrics, tokens=int(generation.completion_mask.sum()))
                kept.finish(step, state)
    except rl.RewardError as error:
        if checkpoint.latest_step(folder) != step:
            checkpoint.save(folder, step, state, notes={"facts": same, "forced": []})
        raise rl.RewardError(f"{error}. The state after {step} steps is saved in {folder}: --resume") from error
    return state.params["policy"]


def answers(config: Config, tokenizer: Tokenizer, network, params: Params, problems: Problems, when: str) -> list[dict]:
    """The greedy answer to every question, as rows of `samples.jsonl`."""
    sample = sampling.jitted_sampler(lengths_of(config), network, tokenizer.eos_id, tokenizer.pad_id, temperature=0.0)
    sampled = sampling.sample_all(sample, params, problems.prompts, jax.random.key(config.seed), batch_size=64)
    texts = sampling.completions(tokenizer, sampled)
    return answer_rows(problems, texts, when=when, time_limit=config.time_limit)


def play(config: Config, run: Path) -> list[dict]:
    """Answer, train, answer again: the rows of `samples.jsonl`."""
    note_command(run)
    tokenizer, network, policy = sft.take_up(config)
    folder, name = config.data_dir / "verifiable", config.grpo.method
    how = {"instruction": config.instruction, "length": config.prompt_length}
    problems = load(folder / "gsm8k_train.jsonl.gz", tokenizer, **how)
    held_out = load(folder / "gsm8k_test.jsonl.gz", tokenizer, most=config.num_held_out, **how)
    rows = answers(config, tokenizer, network, policy, held_out, "before")
    params = train(config, tokenizer, network, policy, problems)
    rows += answers(config, tokenizer, network, params, held_out, "after")
    write_json_lines(run / "samples.jsonl", rows)
    checkpoint.save(run / name, 0, params, notes={"tokenizer": tokenizer.fingerprint})
    forget(run, name)
    return rows


def main(config: Config) -> dict:
    """Play what is not yet played, then count."""
    if config.model is None or config.data_dir is None:
        raise SystemExit(
            "--model (a folder of weights and tokenizer) and --data-dir (with verifiable/) are both needed"
        )
    refuse_processes(config)
    refuse_mesh(config)
    keep_programs()
    with locked(config.run):
        run = open_run(config.run, config, resume=config.resume, force=config.force)
        played = is_played(run, config.grpo.method, resume=config.resume)
        rows = list(read_json_lines(run / "samples.jsonl")) if played else play(config, run)
    report = shares(rows)
    write_json(run / "report.json", report)
    return report


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

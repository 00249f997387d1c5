"""The main job: RLHF in three acts, from random weights to a before/after table.

    python experiments/rlhf.py                                        # the embedded world, about five minutes on two cores
    python experiments/rlhf.py --controls                             # and what must fail: shuffled labels, a stiff leash
    python experiments/rlhf.py --dataset hh --data-dir DIRECTORY      # real human comparisons

(1) supervised fine-tuning on demonstrations of mixed manners, (2) a reward model from annotators' rankings of the policy's
own responses, (3) PPO on a KL leash. The last lines say what changed on held-out prompts, judged by the world's true utility,
which no act has seen. Everything goes to the run's folder: metrics.jsonl, samples.jsonl, curves.png, report.md, report.json.
"""

import dataclasses
import os
from pathlib import Path
from typing import Literal

import hh
import jax.numpy as jnp
import judge
import kept_reward
import numpy as np
import ppo
import report
import reward_model
import sft
import task
import tyro
from acts import keep_programs, note_command, policy_keeper, refuse_mesh, refuse_processes, timed
from ppo import PPOConfig
from reward_model import RewardModelConfig
from rich.console import Console
from rich.markdown import Markdown
from sft import SFTConfig

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.resume import forget
from rlhf_jax.runtime.runs import locked, open_run, write_json_lines
from rlhf_jax.types import Frozen, RankingBatch


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """All three acts."""

    dataset: Literal["world", "hh"] = "world"
    data_dir: Path | None = Path(os.environ["RLHF_JAX_DATA"]) if "RLHF_JAX_DATA" in os.environ else None
    """Folder with `preferences/hh_*_base.jsonl.gz`, for `--dataset hh`."""
    controls: bool = False
    num_shuffled: int = 4
    """Reward models trained on shuffled labels, with `--controls`."""
    sft: SFTConfig = SFTConfig()
    reward: RewardModelConfig = RewardModelConfig()
    ppo: PPOConfig = PPOConfig()


def play_sft(config: Config, run: Path) -> None:
    """Act 1."""
    tokenizer, demonstrations, _ = task.load_demonstrations(config, run)
    options, how = (
        {"seed": config.seed, "mesh": config.mesh},
        {"dtype": config.dtype, "logits_chunk": config.logits_chunk},
    )
    policy = sft.start(config.sft, tokenizer, model=config.model, **options, **how)
    rows = task.demonstration_rows(config, tokenizer, demonstrations)
    params = sft.train(config.sft, policy.config, policy.params, rows, keep=task.keeper(config), **options)
    sft.save(run, tokenizer, policy._replace(params=params))


def play_reward_model(config: Config, run: Path) -> None:
    """Act 2."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    rankings = judge.rankings_of_policy(config, run, num_responses=config.reward.num_responses, held_out=False)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=config.reward.num_responses)
    fit_reward_model(config, run, network, tokenizer, policy, data, run, seed=config.seed, stage="reward_model")


def fit_reward_model(
    config, run, network, tokenizer, policy, data: RankingBatch, save_to: Path, *, seed: int, stage: str
):
    """Train, normalise to mean 0 and standard deviation 1 on the SFT policy's samples, save."""
    options = {"seed": seed, "keep": task.keeper(config), "stage": stage, "mesh": config.mesh}
    params = reward_model.train(config.reward, network, policy, data, **options)
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0][:512])
    moments = kept_reward.reference_moments(config, network, tokenizer, policy, (network, params), prompts, seed=seed)
    kept_reward.save(save_to, params, tokenizer, mean=moments[0], std=moments[1])
    forget(run, stage)


def play_ppo(
    config: Config, run: Path, rewards_from: Path | None = None, save_to: Path | None = None, stage: str = "ppo"
):
    """Act 3; a control reads another reward model and saves elsewhere."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    reward_params, mean, std = kept_reward.load(rewards_from or run, network, tokenizer, config.mesh)
    frozen = Frozen(policy, reward_params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    demonstrations = None
    if config.ppo.ptx_coef:
        demonstrations = task.demonstration_rows(config, tokenizer, task.load_demonstrations(config, run)[1])
    options = {"seed": config.seed, "keep": task.keeper(config), "demonstrations": demonstrations, "stage": stage}
    if stage == "ppo":
        options["keep_policy"] = policy_keeper(run, stage, tokenizer, every=config.ppo.policy_every)
    params, _ = ppo.train(config.ppo, config, network, tokenizer, frozen, prompts, **options)
    checkpoint.save((save_to or run) / "ppo", 0, params, notes={"tokenizer": tokenizer.fingerprint})
    forget(run, stage)


def play_controls(config: Config, run: Path) -> None:
    """Reward models that learned shuffled labels, and a leash too stiff to move on."""
    tokenizer, network, policy = sft.load(run, config.mesh)
    rankings = judge.rankings_of_policy(config, run, num_responses=config.reward.num_responses, held_out=False)
    data = task.ranking_rows(config, tokenizer, rankings, num_responses=config.reward.num_responses)
    for i in range(config.num_shuffled):
        folder = run / "controls" / f"shuffled_labels_{i}"
        rng = np.random.default_rng([config.seed, i])
        shuffled = data.replace(ranks=rng.permuted(data.ranks, axis=1))
        stage = f"shuffled_{i}"
        fit_reward_model(config, run, network, tokenizer, policy, shuffled, folder, seed=i, stage=f"rm_{stage}")
        play_ppo(config, run, rewards_from=folder, save_to=folder, stage=f"ppo_{stage}")
    stiff = dataclasses.replace(config, ppo=dataclasses.replace(config.ppo, kl_coef=1e3, kl_target=None))
    play_ppo(stiff, run, save_to=run / "controls" / "kl_coef_1e3_0", stage="ppo_kl_coef_1e3")


def play_judge(config: Config, run: Path) -> None:
    """Answers, rankings and likelihoods on held-out text, as rows."""
    compared = judge.comparison_rows(config, run)
    rankings = judge.ranking_rows(config, run, num_responses=config.reward.num_responses)
    controls = judge.control_rows(config, run, compared)
    write_json_lines(run / "samples.jsonl", [*compared, *rankings, *judge.demonstration_rows(config, run), *controls])


def main(config: Config) -> dict:
    """Play what is not yet played, then judge; nobody else may write to the run's folder meanwhile."""
    keep_programs()
    if config.data is not None:
        raise SystemExit(
            "--data has no meaning here: the main job samples, ranks and judges in its own world; nothing was started. "
            "Fix: give the file to sft.py, reward_model.py or ppo.py"
        )
    refuse_processes(config)
    if config.dataset == "hh":
        refuse_mesh(config)
    for act in (sft, reward_model, ppo):
        act.check_mesh(config)
    with locked(config.run):
        return hh.main(config) if config.dataset == "hh" else play(config)


def play(config: Config) -> dict:
    """The three acts in the embedded world."""
    run = open_run(config.run, config, resume=config.resume, force=config.force)
    note_command(run)
    timed(run, "sft", lambda: play_sft(config, run), run / "sft")
    timed(run, "reward_model", lambda: play_reward_model(config, run), run / "reward_model")
    timed(run, "ppo", lambda: play_ppo(config, run), run / "ppo")
    if config.controls:
        timed(run, "controls", lambda: play_controls(config, run), run / "controls")

    timed(run, "judge", lambda: play_judge(config, run))
    result = report.write(run, {"dataset": "world", "seed": config.seed, "kl_target": config.ppo.kl_target})
    Console().print(Markdown((run / "report.md").read_text(encoding="utf-8")))
    print(f"report, samples and curves in {run}")
    return result


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""Many PPO runs in one program: what learning rate, KL coefficient and clip do to the result, with error bars over seeds.

    python experiments/sweep.py --run runs/mine

takes up `runs/mine/sft` and `runs/mine/reward_model`. One coefficient at a time leaves its default; every setting runs with
the same seeds, that is the same prompts and the same noise, so that differences are between twins. The iteration of `ppo.py`
is `vmap`ped twice, over settings and over seeds: coefficients are arrays, so there is one compilation. Writes `sweep.jsonl`
(a row for each step, setting and seed), `sweep.json` and `sweep.png` into `runs/mine`. The leash's coefficient is fixed here:
an adaptive one would hide what it does. Intervals are Student's 95 %, over seeds; what the start (acts 1 and 2) adds is not in
them.
"""

import dataclasses
import math
from collections.abc import Sequence

import answers
import jax
import jax.numpy as jnp
import kept_reward
import numpy as np
import ppo
import sft
import task
import tyro
from acts import alone, refuse_mesh, refuse_processes
from ppo import PPOConfig

import rlhf_jax as rl
from rlhf_jax.models.attention import under_vmap
from rlhf_jax.models.heads import init_value_head
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.plots import plot_lines
from rlhf_jax.runtime.runs import write_json, write_json_lines
from rlhf_jax.training.evaluate import mean_interval
from rlhf_jax.training.ppo import critic_from_trunk

LOGGED = {
    "objective/scores": "reward, SFT's standard deviations",
    "objective/kl": "KL, nats per completion",
    "policy/clipfrac_avg": "clipped tokens, share",
}
JUDGED = {"score": "reward", "kl": "KL", "gold": "true utility"}


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Which settings, beside that of `ppo`."""

    learning_rates: tuple[float, ...] = (1e-4, 1e-3)
    kl_coefs: tuple[float, ...] = (0.02, 0.2)
    clips: tuple[float, ...] = (0.1, 0.4)
    num_seeds: int = 4
    num_prompts: int = 128
    """Held-out prompts on which each policy is judged at the end."""
    ppo: PPOConfig = PPOConfig(num_iterations=20, batch_size=64, kl_target=None)


def settings_of(config: Config) -> dict[str, dict[str, float]]:
    """Name to coefficients; the first is the base, each other differs from it in one."""
    base = {name: getattr(config.ppo, name) for name in ("learning_rate", "kl_coef", "clip")}
    found = {"base": base}
    for name, values in (
        ("learning_rate", config.learning_rates),
        ("kl_coef", config.kl_coefs),
        ("clip", config.clips),
    ):
        found |= {f"{name} {value:g}": {**base, name: value} for value in values if value != base[name]}
    return found


def make_steps(config: Config, network: rl.TransformerConfig, eos_id: int, pad_id: int):
    """`init(policy, reward_trunk, coefficients)` and `step(frozen, coefficients, state, batch, keys)` of all runs at once.

    Coefficients are arrays `[S]`, states lead with `[S, R]`, batches and keys with `[R]`.
    """

    def run_of(coefficients: dict[str, jax.Array]):
        chosen = {name: coefficients[name] for name in ("learning_rate", "clip")}
        settings = dataclasses.replace(config.ppo, **chosen)
        return ppo.make_iteration(settings, config, network, network, eos_id, pad_id)

    def init(policy, trunk, coefficients: dict[str, jax.Array], _: jax.Array) -> rl.PPOState:
        critic = {"head": init_value_head(network.model_dim)}
        if config.ppo.separate_critic:
            critic = critic_from_trunk(trunk, network.model_dim)
        return rl.init_ppo_state(policy, critic, run_of(coefficients)[0], kl_coef=coefficients["kl_coef"])

    def step(frozen, coefficients: dict[str, jax.Array], state: rl.PPOState, batch: rl.PPOBatch, key: jax.Array):
        return run_of(coefficients)[1](frozen, state, batch, key)

    over_seeds = jax.vmap(init, in_axes=(None, None, None, 0)), jax.vmap(step, in_axes=(None, None, 0, 0, 0))
    over_settings = (
        jax.vmap(over_seeds[0], in_axes=(None, None, 0, None)),
        jax.vmap(over_seeds[1], in_axes=(None, 0, 0, None, None)),
    )
    return jax.jit(over_settings[0]), jax.jit(over_settings[1], donate_argnums=2)


def train(config: Config, network: rl.TransformerConfig, tokenizer, frozen: rl.Frozen, prompts: rl.PromptBatch):
    """Parameters `[S, R, ...]` of the policies, and a row for each step, setting and seed."""
    settings, seeds = settings_of(config), [config.seed + i for i in range(config.num_seeds)]
    coefficients = {name: jnp.asarray([s[name] for s in settings.values()]) for name in settings["base"]}
    init, step_fn = make_steps(config, network, tokenizer.eos_id, tokenizer.pad_id)
    roots = jax.vmap(jax.random.key)(jnp.asarray(seeds))
    state, rows = init(frozen.ref_params, frozen.reward_params["trunk"], coefficients, roots), []
    num_tokens = len(settings) * len(seeds) * config.ppo.batch_size
    show = {"objective/scores": "score", "objective/kl": "KL"}
    with MetricLog(config.run / "metrics.jsonl", "sweep", config.ppo.num_iterations, show=show) as log:
        for step in range(config.ppo.num_iterations):
            picked = [ppo.pick(prompts, seed, step, config.ppo.batch_size) for seed in seeds]
            batch = rl.PPOBatch(jax.tree.map(lambda *parts: jnp.stack(parts), *picked))
            keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(roots, step)
            state, metrics = step_fn(frozen, coefficients, state, batch, keys)
            metrics = {name: np.asarray(metrics[name]) for name in (*LOGGED, "response/len_mean")}
            rows += [
                {
                    "step": step,
                    "setting": name,
                    "seed": seed,
                    **{metric: _finite(values[s, r]) for metric, values in metrics.items()},
                }
                for s, name in enumerate(settings)
                for r, seed in enumerate(seeds)
            ]
            means = {name: float(np.nanmean(values)) for name, values in metrics.items()}
            log.write(step, means, tokens=int(num_tokens * means["response/len_mean"]))
    return state.params["policy"], rows


def judge(config: Config, tokenizer, reference: answers.Model, params) -> dict[str, dict[str, list[float]]]:
    """Setting to reward, KL and true utility on held-out prompts, one number a seed; the same noise for all."""
    reward = answers.reward_of_run(
        config.run, reference.network, tokenizer, missing_eos_penalty=config.ppo.missing_eos_penalty
    )
    asked = task.load_prompts(config)[1][: config.num_prompts]
    options = {"num_samples": 1, "temperature": config.ppo.temperature, "seed": config.seed + 5}
    found = {}
    for s, name in enumerate(settings_of(config)):
        found[name] = {metric: [] for metric in JUDGED}
        for r in range(config.num_seeds):
            policy = answers.Model(reference.network, jax.tree.map(lambda x, at=(s, r): x[at], params))
            ours = answers.collect(config, tokenizer, policy, reward, asked, **options)
            kl = answers.divergences(policy, reference, ours, temperature=config.ppo.temperature)["exact"]
            measured = {"score": ours.scores, "kl": kl} | ({} if ours.gold is None else {"gold": ours.gold})
            for metric, values in measured.items():
                found[name][metric].append(float(values.mean()))
    return {name: {m: values for m, values in of.items() if values} for name, of in found.items()}


def table(judged: dict[str, dict[str, list[float]]]) -> str:
    """Settings down; each figure, and its difference from the base's twin."""
    metrics = [m for m in JUDGED if m in judged["base"]]
    lines = [f"{'':22}" + "".join(f"{JUDGED[m]:>24}{'against base':>26}" for m in metrics)]
    for name, of in judged.items():
        cells = ""
        for metric in metrics:
            ours = mean_interval(np.asarray(of[metric]))
            gap = mean_interval(np.asarray(of[metric]) - np.asarray(judged["base"][metric]))
            cells += f"{_signed(ours, plus=''):>24}" + (f"{'':26}" if name == "base" else f"{_signed(gap):>26}")
        lines.append(f"{name:22}{cells}".rstrip())
    return "\n".join(lines)


def curves(rows: Sequence[dict]) -> dict[str, list[dict]]:
    """Setting to one row a step: means over seeds with their intervals, for `plot_lines`."""
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["step"]), []).append(row)
    lines: dict[str, list[dict]] = {}
    for (name, step), group in groups.items():
        point = {"step": step}
        for metric in LOGGED:
            values = [row[metric] for row in group]
            if None not in values:
                mean, low, high, _ = mean_interval(np.asarray(values))
                point |= {metric: mean, f"{metric}_low": low, f"{metric}_high": high}
        lines.setdefault(name, []).append(point)
    return lines


def main(config: Config) -> dict[str, dict[str, list[float]]]:
    """Run all, judge all, print the table."""
    refuse_processes(config)
    refuse_mesh(config)
    if config.num_seeds < 2:
        raise SystemExit("--num-seeds: an interval needs two or more; nothing was started")
    if (config.run / "sweep.jsonl").exists():
        raise SystemExit(f"{config.run / 'sweep.jsonl'} is there already and is never overwritten; fix: move it away")
    tokenizer, network, policy = sft.take_up(config)
    network = dataclasses.replace(network, attention_fn=under_vmap(network.attention_fn))
    params, mean, std = kept_reward.load(config.run, network, tokenizer)
    frozen = rl.Frozen(policy, params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    policies, rows = train(config, network, tokenizer, frozen, prompts)
    write_json_lines(config.run / "sweep.jsonl", rows)
    judged = judge(config, tokenizer, answers.Model(network, policy), policies)
    write_json(config.run / "sweep.json", {"settings": settings_of(config), "judged": judged})
    title = f"{config.num_seeds} seeds, {len(prompts.tokens)} prompts"
    panels = list(LOGGED.items())
    plot_lines(curves(rows), config.run / "sweep.png", x=("step", "iteration"), y=panels, title=title)
    print(table(judged))
    return judged


def _finite(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None


def _signed(found, plus: str = "+") -> str:
    return f"{found.mean:{plus}.2f} [{found.low:{plus}.2f}, {found.high:{plus}.2f}]"


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)

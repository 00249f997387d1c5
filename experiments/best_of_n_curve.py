"""The best-of-n curve of a finished run, under the reward model and the world's true utility, with act 3's policy beside it.

Part of `best_of_n.py --run RUN`; writes `best_of_n.jsonl` and `best_of_n.png` into the run's folder. One pool of samples a
held-out prompt gives the whole curve (`rl.best_of_n_mean`); intervals are over prompts.
"""

import dataclasses
from pathlib import Path

import answers
import jax
import jax.numpy as jnp
import judge
import numpy as np
import sft
import task

import rlhf_jax as rl
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.plots import plot_lines
from rlhf_jax.runtime.runs import write_json_lines
from rlhf_jax.training.evaluate import mean_interval

MEAN = jax.jit(rl.best_of_n_mean, static_argnames="num_samples")


@dataclasses.dataclass(frozen=True)
class CurveConfig:
    """Numbers of the curve."""

    num_prompts: int = 128
    pool_size: int = 256
    """N; n goes up to half of it in powers of two."""
    num_samples: int = 4
    """Of act 3's policy to each prompt."""
    policies: tuple[str, ...] = ("ppo",)
    """Folders of the run with policies to show beside the curve."""
    temperature: float = 1.0
    missing_eos_penalty: float = 1.0
    """As in act 3: what an answer without an end loses before it is chosen by."""


def draw_curve(config: task.TaskConfig, run: Path, settings: CurveConfig) -> list[dict]:
    """Sample the pools, print the table, write the rows and the plot; returns the rows."""
    for name in settings.policies:
        if checkpoint.latest_step(run / name) is None:
            raise FileNotFoundError(
                f"{run / name} holds no policy; nothing was written. Fix: --curve.policies of the run's own"
            )
    tokenizer, network, params = sft.load(run)
    reference, penalty = answers.Model(network, params), settings.missing_eos_penalty
    reward = answers.reward_of_run(run, network, tokenizer, missing_eos_penalty=penalty)
    prompts = task.load_prompts(config)[1][: settings.num_prompts]
    options = {"temperature": settings.temperature, "seed": config.seed + 4}
    pool = answers.collect(config, tokenizer, reference, reward, prompts, num_samples=settings.pool_size, **options)
    rows = [row_of_n(pool, 2**i) for i in range(settings.pool_size.bit_length() - 1)]
    for name in settings.policies:
        policy = answers.Model(network, judge.load_policy(run, network, tokenizer, name))
        theirs = answers.collect(
            config, tokenizer, policy, reward, prompts, num_samples=settings.num_samples, **options
        )
        kl = answers.divergences(policy, reference, theirs, temperature=settings.temperature)["exact"]
        rows.append(
            {
                "name": name,
                "kl": float(kl.mean()),
                **_measured("score", theirs.scores),
                **_measured("gold", theirs.gold),
            }
        )
    write_json_lines(run / "best_of_n.jsonl", rows)
    panels = [("score", "reward-model score, SFT std")] + ([] if pool.gold is None else [("gold", "true utility")])
    lines = {"best of n": [row for row in rows if "n" in row]} | {r["name"]: [r] for r in rows if "n" not in r}
    x = ("kl", "KL from SFT, nats (best of n: upper bound)")
    plot_lines(lines, run / "best_of_n.png", x=x, y=panels, title=f"{run}: {len(prompts)} held-out prompts")
    print(table(rows))
    return rows


def row_of_n(pool: answers.Answers, n: int) -> dict:
    """One point of the curve."""
    scores = jnp.asarray(pool.scores, jnp.float32)
    seen = max(float(pool_kl(scores, n).mean()), 0.0)
    row = {"name": f"best of {n}", "n": n, "kl": float(rl.best_of_n_kl(n)), "kl_pool": seen}
    for name, values in (("score", pool.scores), ("gold", pool.gold)):
        if values is not None:
            row |= _measured(name, np.float64(MEAN(scores, jnp.float32(values), num_samples=n))[:, None])
    return row


@jax.jit
def pool_kl(scores: jax.Array, n: int) -> jax.Array:
    """KL of best-of-n from the pool's own law, in which every sample is as likely and equal scores are ties, `[N]`."""
    even = jnp.full(scores.shape, -jnp.log(scores.shape[1]))
    return rl.exact_kl(rl.best_of_n_logprobs(even, scores, num_samples=n), even)


def table(rows: list[dict]) -> str:
    """The rows as text."""
    lines = [f"{'':14} {'KL':>6} {'of pool':>8}  {'score':25} true utility"]
    for row in rows:
        seen = f"{row['kl_pool']:8.3f}" if "kl_pool" in row else " " * 8
        values = [
            f"{row[x]:6.3f} [{row[x + '_low']:.3f}, {row[x + '_high']:.3f}]" for x in ("score", "gold") if x in row
        ]
        lines.append(
            f"{row['name']:14} {row['kl']:6.3f} {seen}  " + "  ".join(f"{value:25}" for value in values).rstrip()
        )
    note = "KL of best of n: log n - (n-1)/n, an upper bound; of pool: of the samples' own law, in which equal scores are ties"
    return "\n".join([*lines, note])


def _measured(name: str, values: np.ndarray | None) -> dict[str, float]:
    """Mean over prompts with its interval; nothing where there is nothing."""
    if values is None:
        return {}
    found = mean_interval(values.mean(axis=1))
    return {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}

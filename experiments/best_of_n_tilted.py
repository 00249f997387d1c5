"""Best-of-n beside the best policy there is at its KL, the tilted one, on problems small enough to sum over."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from scipy.optimize import brentq
from tabular import Tabular, init_problem, run_ppo

import rlhf_jax as rl

TOY = Tabular(vocab=6, length=4)
"""Of the closed-form oracle."""

LAW = jax.jit(rl.best_of_n_logprobs)


def law(logprobs: np.ndarray, scores: np.ndarray, n: int) -> np.ndarray:
    """Probabilities of best-of-n over all completions, `[V]` in float64."""
    rows = (jnp.asarray(x, jnp.float32)[None] for x in (logprobs, scores))
    probs = np.exp(np.float64(LAW(*rows, num_samples=n)[0]))
    return probs / probs.sum()


def exact_kl(probs: np.ndarray, logprobs: np.ndarray) -> float:
    """In float64."""
    return float(np.sum(probs * (np.log(np.maximum(probs, 1e-300)) - logprobs)))


class Toy:
    """One problem of the closed-form oracle, and the tilted policy ref·exp(r/beta)/Z on it."""

    def __init__(self, seed: int):
        self.reference, self.raw_scores = init_problem(TOY, jax.random.key(seed))
        self.logprobs = np.float64(TOY.logprobs(self.reference))
        self.scores = np.float64(self.raw_scores)

    def tilted(self, beta: float) -> tuple[float, float]:
        """KL and expected reward."""
        logits = self.logprobs + self.scores / beta
        probs = np.exp(logits - logits.max())
        probs /= probs.sum()
        return exact_kl(probs, self.logprobs), float(probs @ self.scores)

    def share(self, kl: float, reward: float) -> float:
        """Of the tilted policy's rise over the reference at this KL."""
        beta = np.exp(brentq(lambda x: self.tilted(np.exp(x))[0] - kl, np.log(1e-2), np.log(1e3)))
        base = float(np.exp(self.logprobs) @ self.scores)
        return (reward - base) / (self.tilted(beta)[1] - base)

    def best_of(self, n: int) -> tuple[float, float, float]:
        """Best-of-n's KL, expected reward and share."""
        probs = law(self.logprobs, self.scores, n)
        point = exact_kl(probs, self.logprobs), float(probs @ self.scores)
        return *point, self.share(*point)


def check_tilted(
    sizes: Sequence[int], kl_coefs: Sequence[float], *, num_toys: int, num_iterations: int
) -> dict[str, bool]:
    """Criterion 3: reward at equal KL on toys of the closed-form oracle; and PPO on the axes of the first."""
    toys = [Toy(seed) for seed in range(num_toys)]
    print(
        f"\nreward at equal KL, {len(toys[0].scores)} completions, and its share of the tilted policy's rise over the reference"
    )
    print(f"{'':24} {'KL':>7} {'reward':>7} {'share':>8}   over {len(toys)} toys: mean, lowest, highest")
    shares = np.array([[toy.best_of(n)[2] for toy in toys] for n in sizes])
    for n, of_toys in zip(sizes, shares, strict=True):
        kl, reward, share = toys[0].best_of(n)
        print(f"{f'best of {n}':24} {kl:7.4f} {reward:7.4f} {share:8.2%}   ", end="")
        print(f"{of_toys.mean():.2%} {of_toys.min():.2%} {of_toys.max():.2%}")
    paths = run_ppo(TOY, toys[0].reference, toys[0].raw_scores, kl_coefs, num_iterations=num_iterations)
    for beta, kls, rewards in zip(kl_coefs, *paths, strict=True):
        for at in (num_iterations // 8, num_iterations - 1):
            name = f"PPO {beta:g}, iteration {at + 1}"
            print(f"{name:24} {kls[at]:7.4f} {rewards[at]:7.4f} {toys[0].share(kls[at], rewards[at]):8.2%}")
    gaps = 1 - shares
    over = int((gaps >= 0.1).sum())
    return {
        f"best-of-n never above the tilted policy at equal KL (highest share {shares.max():.2%})": shares.max()
        <= 1 + 1e-4,
        f"and less than 10 % of the rise below it, mean of the toys (worst n {gaps.mean(axis=1).max():.1%}; single toys: "
        f"{over} of {gaps.size} points above, the worst {gaps.max():.1%})": gaps.mean(axis=1).max() < 0.1,
    }

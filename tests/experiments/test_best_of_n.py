"""The study of best-of-n at a small size, and its criteria on what breaks them; `test_evaluate.py` has the curve of a run."""

import best_of_n
import best_of_n_tilted
import numpy as np
import pytest
from best_of_n import Config
from tabular import Tabular

TINY = Config(
    sizes=(2, 4),
    vocab=20,
    length=3,
    num_draws=2**18,
    num_pools=500,
    pool_size=16,
    num_toys=1,
    kl_coefs=(1.0,),
    num_iterations=8,
)


def test_rows_of_the_table_are_prefixes():
    """Every position reads a row of its own prefix, and a completion's number is its place among all."""
    tabular = Tabular(3, 3)
    tokens = np.asarray(tabular.outcomes())
    assert np.asarray(tabular.outcome(tokens)).tolist() == list(range(27))
    rows, place = np.asarray(tabular.rows(tokens)), {}
    for row, completion in zip(rows, tokens, strict=True):
        for t in range(3):
            assert place.setdefault(row[t], tuple(completion[: t + 1])) == tuple(completion[: t + 1])
    assert sorted(place) == list(range(tabular.num_prefixes))


def test_the_study_at_a_small_size(monkeypatch, capsys):
    monkeypatch.setattr(best_of_n_tilted, "TOY", Tabular(4, 3))
    path = np.linspace(0.1, 1.0, TINY.num_iterations)[None]
    monkeypatch.setattr(best_of_n_tilted, "run_ppo", lambda *problem, num_iterations: (path, path))
    passed = best_of_n.main(TINY)
    out = capsys.readouterr().out
    assert len(passed) == 8
    assert [list(passed.values())[i] for i in (0, 1, 3, 4, 5)] == [True] * 5
    assert out.count("\npass: ") + out.count("\nFAIL: ") == 8
    assert "PPO 1, iteration 8" in out


def test_few_completions_fail_the_closed_form():
    rng = np.random.default_rng(0)
    logprobs = np.log(np.full(20, 0.05))
    passed = best_of_n.check_kl(Config(sizes=(2, 64), num_draws=2**14), logprobs, rng.normal(size=20))
    assert [held for held in passed.values()] == [False, True, True]


def test_a_biased_pool_fails(monkeypatch):
    """The best of n + 1 in place of n."""
    right, rng = best_of_n.rl.best_of_n_mean, np.random.default_rng(0)
    monkeypatch.setattr(
        best_of_n.rl, "best_of_n_mean", lambda *pools, num_samples: right(*pools, num_samples=num_samples + 1)
    )
    logprobs = np.log(np.full(5000, 1 / 5000))
    passed = best_of_n.check_pools(TINY, logprobs, rng.normal(size=5000))
    assert [held for held in passed.values()] == [False, False, True]


@pytest.mark.slow
def test_the_librarys_own_ppo_reaches_the_tilted_policy():
    """J within 0.01 of beta log Z: sampler, experience, objective and iteration as every run uses them."""
    toy, betas = best_of_n_tilted.Toy(0), (1.0, 0.3)
    kl, reward = best_of_n_tilted.run_ppo(best_of_n_tilted.TOY, toy.reference, toy.raw_scores, betas)
    for beta, nats, earned in zip(betas, kl[:, -1], reward[:, -1], strict=True):
        best = beta * np.log(np.exp(toy.logprobs + toy.scores / beta).sum())
        assert best - 0.01 <= earned - beta * nats <= best + 1e-4
        assert 0.99 < toy.share(nats, earned) <= 1.0001

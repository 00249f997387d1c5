"""What the scripts make of rankings: reward models in an ensemble, and direct methods in rounds."""

import dataclasses

import dpo
import jax
import kept_reward
import numpy as np
import pytest
import reward_ensemble
import reward_model
import sampling
import sft
import task
from reward_model import RewardModelConfig
from scoring import row_logprobs
from sft import SFTConfig

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.padding import alike_batch_indices
from rlhf_jax.functional import first_choice_loss
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.training.ensembles import average_members
from rlhf_jax.types import RankingBatch

NETWORK = SFTConfig(model_dim=16, num_heads=2, mlp_dim=16, num_layers=1)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder with a policy of random weights, in a sliver of the world."""
    for name, value in {"DEMONSTRATIONS": 300, "RANKINGS": 24, "PROMPTS": 40, "HELD_OUT": 20}.items():
        monkeypatch.setattr(task, f"NUM_{name}", value)
    config = task.TaskConfig(run=tmp_path / "run", vocab_size=600, prompt_length=24, response_length=6)
    tokenizer, *_ = task.load_demonstrations(config, config.run)
    sft.save(config.run, tokenizer, sft.start(NETWORK, tokenizer, model=None, seed=0))
    return config


def as_config(kind, run, **options):
    given = {field.name: getattr(run, field.name) for field in dataclasses.fields(task.TaskConfig)}
    return kind(**given, **options)


def ragged_rankings(num_prompts):
    """Three ranked rows of random tokens a prompt; most are short, none is as long as the columns."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 60, (num_prompts, 3, 64)).astype(np.int32)
    used = np.arange(64) < np.minimum(rng.geometric(1 / 12, (num_prompts, 3)) + 2, 60)[..., None]
    ranks = np.tile(np.arange(3, dtype=np.int32), (num_prompts, 1))
    return RankingBatch(tokens, used.astype(np.int32), used & (np.arange(64) > 0), ranks, ranks >= 0)


def test_buckets_cut_padding_and_change_no_loss(tmp_path):
    """Each step's rows, whole, have the loss that was logged of them cut; two widths; without buckets the order is any."""
    data, numbers = ragged_rankings(48), RewardModelConfig(num_epochs=1, batch_size=4, buckets=2, learning_rate=0.0)
    network = sft.network_config(NETWORK, 64)
    trunk = sft.transformer.init(jax.random.key(0), network)
    config = task.TaskConfig(run=tmp_path)
    params = reward_model.train(numbers, network, trunk, data, seed=5, keep=task.keeper(config))
    logged = [row["rm/loss"] for row in read_json_lines(tmp_path / "metrics.jsonl")]
    objective = jax.jit(reward_model.build_objective(numbers, network))
    batch = reward_model.batches_of(numbers, data, 5)
    lengths, widths = data.segment_ids.sum(axis=-1).max(axis=-1), set()
    assert len(logged) == 12
    for step, loss in enumerate(logged):
        rows = alike_batch_indices(5, step, lengths=lengths, batch_size=4)
        total, weight, _ = objective(params, jax.tree.map(lambda x, rows=rows: x[rows], data))
        assert loss == pytest.approx(float(total / weight), rel=1e-5)
        widths.add(batch(step).tokens.shape[-1])
        assert batch(step).segment_ids.sum() == data.segment_ids[rows].sum()
    assert widths == {32, 64}
    rows = batch_indices(5, 1, num_examples=48, batch_size=4)
    plain = reward_model.batches_of(dataclasses.replace(numbers, buckets=0), data, 5)(1)
    jax.tree.map(np.testing.assert_array_equal, plain, jax.tree.map(lambda x: x[rows], data))


@pytest.mark.parametrize("act", ["reward_model", "dpo"])
def test_shared_prompts_change_no_loss(run, tmp_path, monkeypatch, act):
    """From the sampled answers on, step by step."""
    asked, shared_prompts = [], task.shared_prompts
    monkeypatch.setattr(task, "shared_prompts", lambda *args: asked.append(shared_prompts(*args)) or asked[-1])
    tokenizer, network, policy = sft.load(run.run)
    prompts, _ = task.load_prompts(run)
    questions = [record.prompt[0].content for record in prompts[:24]]
    rankings = sampling.collect_rankings(run, network, tokenizer, policy, questions, num_responses=3, seed=0)
    numbers = {"num_epochs": 2, "batch_size": 8, "learning_rate": 3e-3}
    logged = []
    for share in (False, True):
        folder = tmp_path / f"shared_{share}"
        folder.mkdir()
        options = {"seed": 0, "keep": task.keeper(dataclasses.replace(run, run=folder)), "stage": act}
        if act == "dpo":
            settings = dpo.DPOConfig(**numbers, share_prompts=share)
            data = dpo.as_batch(as_config(dpo.Config, run, dpo=settings), network, tokenizer, rankings, policy)
            dpo.train(settings, network, policy, data, **options)
        else:
            settings = RewardModelConfig(**numbers, num_responses=3, share_prompts=share)
            data = task.ranking_rows(run, tokenizer, rankings, num_responses=3)
            reward_model.train(settings, network, policy, data, **options)
        logged.append(
            [row["loss" if "loss" in row else "rm/loss"] for row in read_json_lines(folder / "metrics.jsonl")]
        )
    assert asked[0] is None
    assert 1 < asked[1].prompt <= run.prompt_length
    assert len(set(logged[0])) == len(logged[0]) >= 6
    np.testing.assert_allclose(*logged, rtol=1e-4)


@pytest.mark.parametrize("numbers", [{"buckets": -1}, {"buckets": 2, "ensemble": 2}])
def test_buckets_that_cannot_be_are_refused_at_once(tmp_path, numbers):
    config = reward_model.Config(run=tmp_path / "run", reward=RewardModelConfig(**numbers))
    with pytest.raises(SystemExit, match=r"nothing was started. Fix: 0 or more buckets"):
        reward_model.main(config)
    assert not config.run.exists()


def test_an_ensemble_and_the_mean_of_its_weights(run, capsys, monkeypatch):
    """Members start together and part; the run's reward model is their mean, which act 3 takes up as any other."""

    def collect(config, network, tokenizer, policy, questions, *, num_responses, seed):
        return task.world_rankings(questions, [["yes", "I do not know", q] for q in questions], seed=seed)

    monkeypatch.setattr(sampling, "collect_rankings", collect)
    numbers = RewardModelConfig(num_epochs=2, batch_size=8, num_responses=3, ensemble=3, learning_rate=1e-2)
    reward_model.main(as_config(reward_model.Config, run, reward=numbers))
    tokenizer, network, _ = sft.load(run.run)
    averaged, _, std = kept_reward.load(run.run, network, tokenizer)
    members = checkpoint.restore(
        run.run / "reward_ensemble", jax.tree.map(lambda x: np.zeros((3, *x.shape), np.float32), averaged)
    )
    jax.tree.map(np.testing.assert_array_equal, average_members(members), averaged)
    weights = np.asarray(members["head"]["weight"])
    assert len(np.unique(weights, axis=0)) == 3
    assert np.abs(weights - weights.mean(axis=0)).max() < 0.1
    notes = checkpoint.read_notes(run.run / "reward_ensemble")
    assert len(notes["means"]) == len(notes["stds"]) == 3
    assert std > 0
    rows = list(read_json_lines(run.run / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(6))
    assert rows[-1]["rm/loss"] < rows[0]["rm/loss"]
    text = capsys.readouterr().out
    for name in ("member 0", "member 2", "mean", "WCO", "UWO", "WARM", "held-out accuracy"):
        assert name in text


def test_accuracies_are_shares_of_ordered_pairs(run, monkeypatch):
    """By a loop: of raw scores, of the mean of normalised ones, and of the mean weights'."""
    raw = np.random.default_rng(0).normal(size=(2, 12)).astype(np.float32)
    ranks, mask = np.array([[0, 1, 1], [2, 0, 1], [0, 0, 0], [1, 0, 0]]), np.ones((4, 3), bool)
    mask[3, 2] = False
    data = RankingBatch(np.zeros((4, 3, 5), np.int32), np.ones((4, 3, 5), np.int32), None, ranks, mask)
    monkeypatch.setattr(reward_ensemble, "member_scores", lambda network, params, *rows: raw)
    monkeypatch.setattr(reward_ensemble, "score_rows", lambda network, params, *rows: -params["x"][0] * raw[0])
    moments = (np.array([0.5, -1.0]), np.array([1.0, 9.0]))
    found = reward_ensemble.accuracies(None, {"x": np.array([[1.0], [3.0]])}, moments, data)
    normal = (raw - moments[0][:, None]) / moments[1][:, None]

    def share(scores):
        of_prompts, hits = scores.reshape(4, 3), []
        for b, i, j in np.ndindex(4, 3, 3):
            if mask[b, i] and mask[b, j] and ranks[b, i] < ranks[b, j]:
                hits.append(of_prompts[b, i] > of_prompts[b, j])
        return np.mean(hits), len(hits)

    expected = {"member 0": raw[0], "member 1": raw[1], "mean": normal.mean(axis=0), "WARM": -raw[0]}
    expected |= {"WCO": normal.min(axis=0), "UWO": normal.mean(axis=0) - 0.5 * normal.var(axis=0)}
    for name, scores in expected.items():
        assert (found[name].mean, found[name].n) == pytest.approx(share(scores)), name
    assert set(found) == set(expected)


def test_a_ranking_loss_by_its_name(run):
    """And coefficients that only pairs have are refused with another."""
    assert reward_model.RANKING_LOSSES["first_choice"] is first_choice_loss
    _, network, _ = sft.load(run.run)
    with pytest.raises(ValueError, match="ranking_loss replaces it"):
        reward_model.build_objective(RewardModelConfig(ranking_loss="plackett_luce", label_smoothing=0.1), network)


@pytest.mark.parametrize("reference", ["first", "previous"])
def test_rounds_of_a_direct_method(run, monkeypatch, reference):
    """Each goes on from the last one's policy, which answers other questions; the reference is the one named."""
    seen, questions = [], []

    def train(config, network, policy, data, *, seed, keep, stage, mesh):
        seen.append((policy, data, seed, stage))
        return jax.tree.map(lambda x: 1.2 * x, policy)

    collect = sampling.collect_rankings
    monkeypatch.setattr(
        sampling, "collect_rankings", lambda *args, **kw: questions.append(args[4]) or collect(*args, **kw)
    )
    monkeypatch.setattr(dpo, "train", train)
    monkeypatch.setattr(dpo.judge, "gold_line", lambda *_: "")
    dpo.main(as_config(dpo.Config, run, dpo=dpo.DPOConfig(num_rounds=2, reference=reference, num_responses=3)))
    _, network, first = sft.load(run.run)
    (start, _, seed_0, _), (second, data, seed_1, _) = seen
    assert [stage for *_, stage in seen] == ["dpo", "dpo_round_1"]
    assert seed_1 == seed_0 + 1
    jax.tree.map(np.testing.assert_array_equal, start, first)
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x, 1.2 * y), second, first)
    assert set(questions[1]) != set(questions[2])  # those of the held-out comparisons come first
    flat = (-1, data.tokens.shape[-1])
    expected = row_logprobs(
        network,
        {"first": first, "previous": second}[reference],
        data.tokens.reshape(flat),
        data.segment_ids.reshape(flat),
    )
    np.testing.assert_allclose(data.ref_logprobs.reshape(flat), expected, rtol=1e-4, atol=1e-5)


def test_answers_to_a_file_s_prompts_are_ranked_by_nobody(run):
    config = as_config(
        dpo.Config, dataclasses.replace(run, data=run.run / "mine.jsonl"), dpo=dpo.DPOConfig(num_rounds=2)
    )
    with pytest.raises(SystemExit, match="nobody ranks new answers"):
        dpo.main(config)

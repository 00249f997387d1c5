"""The experiment end to end from a random model directory: its files, its accuracy, a reward that fails, and going on."""

import dataclasses
import gzip
import json
import re

import gsm8k
import gsm8k_iteration
import gsm8k_problems
import jax
import numpy as np
import pytest
from grpo_methods import GRPOConfig
from scipy.stats import binomtest

import rlhf_jax as rl
from rlhf_jax.data.tokenizers import byte_tokenizer, save_tokenizer
from rlhf_jax.models import huggingface
from rlhf_jax.runtime import checkpoint, faults
from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.training.verifiable import final_number, make_full_match

NETWORK = rl.TransformerConfig(
    vocab_size=259, num_layers=1, model_dim=16, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=24
)
SETTINGS = GRPOConfig(
    num_iterations=3, num_prompts=4, group_size=2, num_epochs=1, num_minibatches=2, learning_rate=1e-3, save_every=100
)


def problems(start, count):
    for i in range(start, start + count):
        content = "Again and again? " * 20 if i % 10 == 9 else f"What is {i} and 1?"
        prompt = [{"role": "user", "content": content}]
        yield {"id": f"made/{i}", "prompt": prompt, "answer": f"{i + 1:,}", "solution": "", "source": "made"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """A random model of bytes, and questions in the layout of the real set."""
    root = tmp_path_factory.mktemp("gsm8k")
    params = rl.transformer.init(jax.random.key(0), NETWORK)
    huggingface.save(
        root / "model",
        params,
        huggingface.llama_config(NETWORK),
        extra_files=lambda to: save_tokenizer(byte_tokenizer(), to),
    )
    (root / "data" / "verifiable").mkdir(parents=True)
    for split, rows in (("train", problems(0, 40)), ("test", problems(1000, 20))):
        with gzip.open(root / "data" / "verifiable" / f"gsm8k_{split}.jsonl.gz", "wt", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
    return gsm8k.Config(
        run=root / "run",
        model=root / "model",
        data_dir=root / "data",
        instruction=" Reply ####",
        prompt_length=60,
        response_length=8,
        num_held_out=16,
        grpo=SETTINGS,
    )


@pytest.fixture(scope="module", autouse=True)
def _a_form_that_bytes_by_chance_have():
    """A random model never writes `####`: with rewards that are all 0, nothing would be learned."""
    patch = pytest.MonkeyPatch()
    patch.setitem(gsm8k_problems.REWARDS, "form", make_full_match(re.compile(r"[\x00-\x7f].*", re.DOTALL)))
    yield
    patch.undo()


@pytest.fixture(scope="module")
def calls():
    """What the host starts of an iteration, in order."""
    seen, patch = [], pytest.MonkeyPatch()

    def noted(name, function):
        return lambda *args, **options: (seen.append(name), function(*args, **options))[1]

    def build(*args, **options):
        optimizer, sample, *rest = gsm8k_iteration.build(*args, **options)
        names = ("reference", "experience", "update")
        return optimizer, sample, *(noted(name, part) for name, part in zip(names, rest, strict=True))

    patch.setattr(gsm8k, "build", build)
    patch.setattr(gsm8k, "score", noted("score", gsm8k_problems.score))
    yield seen
    patch.undo()


@pytest.fixture(scope="module")
def report(config, calls):
    return gsm8k.main(config)


def test_devices_have_the_reference_to_compute_while_the_host_rewards(report, calls):
    assert calls == ["reference", "score", "experience", "update"] * SETTINGS.num_iterations


def test_files_and_figures_follow_from_the_samples(config, report, capsys):
    assert json.loads((config.run / "report.json").read_text()) == report
    rows = list(read_json_lines(config.run / "samples.jsonl"))
    assert [row["when"] for row in rows] == ["before"] * 16 + ["after"] * 16
    ids = [f"made/{i}" for i in range(1000, 1018) if i % 10 != 9]  # the long ones are left out
    assert [row["id"] for row in rows[:16]] == [row["id"] for row in rows[16:]] == ids[:16]
    for row in rows:
        assert row["right"] == float(final_number(row["completion"]) == final_number(row["answer"]))
        assert row["answer"] == f"{int(row['id'].removeprefix('made/')) + 1:,}"
        assert row["question"].endswith(" and 1? Reply ####")
    for when in ("before", "after"):
        right = [row["right"] for row in rows if row["when"] == when]
        wilson = binomtest(int(sum(right)), 16).proportion_ci(method="wilson")
        found = report[when]["right"]
        assert (found["mean"], found["n"]) == (np.mean(right), 16)
        assert (found["low"], found["high"]) == pytest.approx((wilson.low, wilson.high), abs=1e-6)


def test_metrics_name_every_reward(config, report):
    rows = list(read_json_lines(config.run / "metrics.jsonl"))
    assert [(row["stage"], row["step"]) for row in rows] == [("grpo", 0), ("grpo", 1), ("grpo", 2)]
    for name in ("exact", "form"):
        assert all({f"reward/{name}", f"reward/{name}_std"} <= set(row) for row in rows)
        assert all(row[f"reward/{name}_failed"] == 0 for row in rows)
    assert all(0 < row["reward/form"] < 1 for row in rows)
    for row in rows:
        expected = row["reward/exact"] + config.form_weight * row["reward/form"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-6)
    assert abs(rows[0]["objective/kl"]) < 1e-4
    assert rows[0]["policy/first_approxkl"] < 1e-6


def test_a_reward_that_fails_leaves_the_state_and_the_run_goes_on_as_if_nothing_had_been(config, report, tmp_path):
    """Two rewards a batch, two calls for the answers before: visit 5 is the first reward of step 1."""
    again = dataclasses.replace(config, run=tmp_path / "run")
    with faults.injected("reward@5=raise"), pytest.raises(rl.RewardError) as caught:
        gsm8k.main(again)
    text = str(caught.value)
    assert "grpo step 1: reward 'exact' (make_exact_number.<locals>.exact_number) raised InjectedFaultError" in text
    assert "The state after 1 steps is saved in" in text
    assert checkpoint.latest_step(again.run / "state" / "grpo") == 1
    resumed = gsm8k.main(dataclasses.replace(again, resume=True))
    assert resumed == report
    assert gsm8k.main(dataclasses.replace(again, resume=True)) == report  # and once more, when nothing is left to do
    final = [
        checkpoint.restore(c.run / "grpo", rl.transformer.init(jax.random.key(1), NETWORK)) for c in (config, again)
    ]
    jax.tree.map(np.testing.assert_array_equal, *final)
    start = huggingface.load(config.model).params
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), final[0], start)))


def test_a_reward_that_hangs_is_masked_where_that_is_chosen(config, tmp_path):
    """The whole call hangs once; completion by completion it does not: nothing is lost. NaN in all of a call stops."""
    again = dataclasses.replace(config, run=tmp_path / "run", time_limit=0.5, mask_failures=True)
    with faults.injected("reward@3=sleep:30"):
        gsm8k.main(again)
    assert [row["reward/exact_failed"] for row in read_json_lines(again.run / "metrics.jsonl")] == [0, 0, 0]
    with faults.injected("reward=nan"), pytest.raises(rl.RewardError, match=r"before: reward 'exact' .* returned nan"):
        gsm8k.main(dataclasses.replace(again, run=tmp_path / "other"))


def test_the_form():
    for text, right in {
        "so\n#### 42": 1,
        "#### -1,234.5 ": 1,
        "####$7": 1,
        "42": 0,
        "#### 42 apples": 0,
        "#### ": 0,
    }.items():
        assert (gsm8k_problems.FORM.fullmatch(text) is not None) == right, text


def test_what_is_missing_is_said(config, tmp_path):
    with pytest.raises(SystemExit, match=r"--model .* are both needed"):
        gsm8k.main(dataclasses.replace(config, run=tmp_path / "run", model=None))
    remax = dataclasses.replace(config, run=tmp_path / "run", grpo=dataclasses.replace(SETTINGS, method="remax"))
    with pytest.raises(ValueError, match="not offered here; nothing was started"):
        gsm8k.main(remax)
    with pytest.raises(ValueError, match="no question fits into 3 tokens"):
        gsm8k.main(dataclasses.replace(config, run=tmp_path / "short", prompt_length=3))

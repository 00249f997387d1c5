"""The benchmarks do the work that they say: every task on a small network, its roofline by hand, the table of pairs."""

import dataclasses
import sys

import compare
import jax
import numpy as np
import products
import pytest
import roofline
import tasks
import work

SIZES = work.Sizes(rows=2, length=8, prompts=4, prompt=4, new=3, epochs=2, minibatches=2, groups=2, group_size=2)
SMALL = {"vocab_size": 32, "num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 2, "head_dim": 8}
NETWORK = dataclasses.replace(work.MODELS["tiny"], mlp_dim=24, unroll=1, **SMALL)
WEIGHTS = work.random_weights(NETWORK)
UNITS = {"sft": 16, "rm": 2, "gen": 12, "ppo": 4, "grpo": 4, "dpo": 2}


@pytest.fixture(scope="module", params=tasks.TASKS)
def task(request):
    return request.param, tasks.TASKS[request.param](NETWORK, SIZES, WEIGHTS)


def test_every_task_is_done(task):
    """Twice, with finite figures and as many units as its sizes say."""
    name, made = task
    assert made.units == UNITS[name]
    for i in range(2):
        done = made.step(i)
    if name == "gen":
        assert done.completion_mask.sum() == made.units
        assert not done.ended.any()
    else:
        assert done["grad/finite"] == 1


def forward_flops(rows, length, output, read):
    """Of what each token meets: the weights of keys and values; if its state is read all others, and all keys of its row."""
    others = 2 * 16 * 16 + 3 * 16 * 24 + output
    return 2 * rows * (length * 2 * 16 * 16 + read * (others + 2 * 16 * length))


def test_what_a_step_multiplies():
    """The backward pass is twice the forward; of an iteration every epoch updates policy and critic."""
    counted = tasks.supervised(NETWORK, SIZES, WEIGHTS).count()["step"].flops
    assert counted == 3 * forward_flops(2, 8, 32 * 16, read=8)
    longer = dataclasses.replace(SIZES, epochs=SIZES.epochs + 1)
    usual, more = (tasks.ppo(NETWORK, sizes, WEIGHTS).count()["learn"].flops for sizes in (SIZES, longer))
    assert more - usual == 3 * (forward_flops(4, 7, 32 * 16, read=3 + 1) + forward_flops(4, 7, 16, read=3 + 1))


def test_generation_reads_its_weights_for_every_token():
    phases = tasks.generation(NETWORK, SIZES, WEIGHTS).count()
    weights = roofline.num_bytes(WEIGHTS.policy()) - 4 * 32 * 16
    cache = 2 * 4 * 4 * 2 * 8
    assert phases["prefill"].bytes == weights + 4 * cache
    assert phases["decode"].bytes == 2 * weights + (5 + 6) * cache


def test_the_bound_is_the_longer_time_of_each_phase():
    phases = {"one": roofline.Phase(100.0, 10.0), "other": roofline.Phase(10.0, 60.0)}
    assert roofline.bound(phases, roofline.Rates(flops=10.0, bytes=20.0)) == 10 + 3
    assert roofline.line(phases, roofline.Rates(10.0, 20.0), 26.0)["fraction"] == 0.5


def test_both_libraries_multiply_the_same():
    pytest.importorskip("torch")
    left, right = (
        np.random.default_rng(i).standard_normal(shape, np.float32) for i, shape in enumerate([(3, 5), (5, 4)])
    )
    for multiply in (products.multiply_xla, products.multiply_torch):
        np.testing.assert_allclose(np.asarray(multiply(left, right)()), left.astype(float) @ right, rtol=1e-5)


def test_rates_count_every_multiplication_and_addition(monkeypatch):
    """On a clock of our own: two milliseconds a row."""
    monkeypatch.setattr(products, "seconds", lambda run: 2.0 * run())
    monkeypatch.setattr(products, "SHAPES", {"one": (1000, 500, 2000), "other": (10, 1000, 100)})
    found = products.rates(lambda left, right: lambda: left.shape[0] / 1000, calls=3)
    assert found == {"one": 1.0, "other": 0.1}


def test_stored_weights_are_those_that_were_written(tmp_path):
    stored = work.stored_weights(NETWORK, tmp_path)
    for mine, theirs in zip(stored, WEIGHTS, strict=True):
        assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), mine(), theirs()))


def test_the_table_of_pairs():
    def side(value):
        figures = {"time_to_first_step_s": 3.0, "peak_rss_mb": 400.0, "roofline": {"fraction": 0.5}}
        return {"value": value, **figures}

    pairs = [
        {"name": "peer", "task": task, "size": "tiny", "ratio": ratio, "ours": side(10 * ratio), "peer": side(10.0)}
        for task in ("dpo", "sft")
        for ratio in (1.0, 3.0, 2.0)
    ]
    assert compare.rows(pairs) == [
        f"| tiny | {task} | peer | 20 | 10 | 2.00 [1.00, 3.00] | 3 | 3, 3 | 400, 400 | 50 |" for task in ("sft", "dpo")
    ]


def test_a_peer_is_any_command():
    speak = "print('hello'); print('{\"value\": 1}'); print('{\"value\": 2}')"
    assert compare.run([sys.executable, "-S", "-c", speak]) == {"value": 2}
    with pytest.raises(SystemExit, match="ended with 3 and no figures"):
        compare.run([sys.executable, "-S", "-c", "raise SystemExit(3)"])
    with pytest.raises(SystemExit, match=r"--peers are commands with \{task\} and \{size\}"):
        compare.main(compare.Config(peers=("peer=python peer.py",)))


def test_a_turn_is_a_pair_with_each_peer(monkeypatch):
    """One run of ours, one of each peer; the next turn goes backwards."""
    asked = []

    def run(command):
        asked.append(command[0])
        return {"value": {"a": 2.0, "b": 5.0}.get(command[0], 10.0), "units_per_cpu_s": 1.0}

    monkeypatch.setattr(compare, "run", run)
    config = compare.Config(peers=("one=a {task} x={size}", "other=b {task} {size}"))
    for turn in (0, 1):
        pairs = compare.compare(config, "sft", "tiny", turn)
        assert [(pair["name"], pair["ratio"], pair["cpu_ratio"]) for pair in pairs] == [
            ("one", 5.0, 1.0),
            ("other", 2.0, 1.0),
        ]
    assert asked == ["b", "a", sys.executable, sys.executable, "a", "b"]

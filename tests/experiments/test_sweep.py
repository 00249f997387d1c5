"""The sweep of untrained networks: every run of the one program is the run that `ppo.py` would make of its coefficients."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import ppo
import pytest
import sweep
import task
from experiments.untrained import LENGTHS, shrink, write_run

import rlhf_jax as rl
from rlhf_jax.runtime.runs import read_json_lines

NUMBERS = ppo.PPOConfig(
    num_iterations=3, batch_size=4, learning_rate=1e-2, num_epochs=1, num_minibatches=2, kl_target=None
)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        shrink(patch)
        chosen = {"learning_rates": (1e-3,), "kl_coefs": (1.0,), "clips": (), "num_seeds": 2, "num_prompts": 4}
        run = write_run(tmp_path_factory.mktemp("runs") / "untrained")
        yield sweep.Config(run=run, seed=3, ppo=NUMBERS, **chosen, **LENGTHS)


@pytest.fixture(scope="module")
def judged(config):
    return sweep.main(config)


def test_settings_leave_the_base_one_at_a_time():
    config = sweep.Config(learning_rates=(3e-4, 1e-3), kl_coefs=(0.2,), clips=(0.1,))
    base = {"learning_rate": 3e-4, "kl_coef": 0.07, "clip": 0.2}
    assert sweep.settings_of(config) == {
        "base": base,
        "learning_rate 0.001": {**base, "learning_rate": 1e-3},
        "kl_coef 0.2": {**base, "kl_coef": 0.2},
        "clip 0.1": {**base, "clip": 0.1},
    }


def test_each_run_is_one_of_ppo(config, judged):
    """Of the last setting and the second seed: the same scores and KL, step by step."""
    rows = [row for row in read_json_lines(config.run / "sweep.jsonl") if row["setting"] == "kl_coef 1"]
    assert [(row["step"], row["seed"]) for row in rows] == [(step, seed) for step in range(3) for seed in (3, 4)]
    tokenizer, network, policy = sweep.sft.load(config.run)
    params, mean, std = sweep.kept_reward.load(config.run, network, tokenizer)
    frozen = rl.Frozen(policy, params, jnp.asarray(mean), jnp.asarray(std))
    prompts = task.prompt_rows(config, tokenizer, task.load_prompts(config)[0])
    settings = dataclasses.replace(NUMBERS, kl_coef=1.0)
    optimizer, iteration = ppo.make_iteration(settings, config, network, network, tokenizer.eos_id, tokenizer.pad_id)
    critic = sweep.critic_from_trunk(params["trunk"], network.model_dim)
    state, iteration = rl.init_ppo_state(policy, critic, optimizer, kl_coef=1.0), jax.jit(iteration)
    for step, row in enumerate(rows[1::2]):  # the leash is felt from the third on: before the first update the KL is 0
        batch = rl.PPOBatch(ppo.pick(prompts, 4, step, 4))
        state, metrics = iteration(frozen, state, batch, jax.random.fold_in(jax.random.key(4), step))
        for name in sweep.LOGGED:
            assert row[name] == pytest.approx(float(metrics[name]), rel=1e-3, abs=1e-5), name


def test_files_and_table(config, judged, capsys):
    stored = json.loads((config.run / "sweep.json").read_text())
    assert stored["judged"] == judged
    assert (config.run / "sweep.png").read_bytes().startswith(b"\x89PNG")
    lines = sweep.table(judged).splitlines()
    assert [line.split("  ")[0] for line in lines[1:]] == ["base", "learning_rate 0.001", "kl_coef 1"]
    gap = np.subtract(judged["kl_coef 1"]["gold"], judged["base"]["gold"]).mean()
    assert f"{gap:+.2f} [" in lines[3]
    assert judged["learning_rate 0.001"] != judged["base"]
    with pytest.raises(SystemExit, match="is there already and is never overwritten"):
        sweep.main(config)

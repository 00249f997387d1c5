"""Where a PPO iteration's time goes: its parts, compiled one by one, beside the whole as one program.

    python benchmarks/iteration.py --picture docs/where_time_goes.png

Prints one JSON line a network: seconds of each part (median of repeats taken in turns), and of the whole. Random weights, no
end of sequence, so that every row has its full length; two epochs of four minibatches; policy, critic, reference and reward
model of one size, float32. `decode` is what sampling takes beyond its first token. Two CPU cores, about five minutes.
"""

import argparse
import json
import statistics
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rlhf_jax as rl
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.training.ppo import critic_from_trunk


class Case(NamedTuple):
    """A network and the sizes of its rollout."""

    network: rl.TransformerConfig
    rows: int
    prompt: int
    new: int


def network(vocab_size, num_layers, model_dim, heads, mlp_dim):
    """Heads that share nothing."""
    return rl.TransformerConfig(
        vocab_size=vocab_size,
        num_layers=num_layers,
        model_dim=model_dim,
        num_heads=heads,
        num_kv_heads=heads,
        head_dim=model_dim // heads,
        mlp_dim=mlp_dim,
        unroll=num_layers,
    )


CASES = {
    "world": Case(network(1024, 3, 80, 4, 192), 192, 16, 19),
    "small": Case(network(8192, 8, 512, 8, 1536), 32, 64, 64),
}
"""The default run's network and batch, and one a hundred times larger."""


def parts(case):
    """The number of parameters, and by name `run() -> arrays`: the whole iteration, and its parts, each on the same numbers."""
    model, key = rl.causal_model(case.network), jax.random.key(0)
    critic, optimizer = rl.separate_critic(model), rl.ppo_optimizer(1e-6)
    policy, dim = rl.transformer.init(key, case.network), case.network.model_dim
    reward = {"trunk": policy, "head": rl.init_reward_head(key, dim)}
    frozen = rl.Frozen(policy, reward, jnp.zeros(()), jnp.ones(()))
    state = rl.init_ppo_state(policy, critic_from_trunk(policy, dim), optimizer)
    tokens = np.random.default_rng(0).integers(4, case.network.vocab_size, (case.rows, case.prompt))
    prompts = rl.PromptBatch(jnp.asarray(tokens, jnp.int32), jnp.ones(tokens.shape, bool))
    first, sample = (
        jax.jit(partial(rl.generate, model, eos_id=None, pad_id=0, max_new_tokens=new)) for new in (1, case.new)
    )
    score, experience = rl.make_score_fn(model), rl.make_experience_fn(model, critic)
    step = rl.make_train_step(rl.actor_critic(model, critic), optimizer)
    update = rl.make_ppo_update(step, num_epochs=2, num_minibatches=4)
    whole = jax.jit(rl.make_ppo_iteration(sample, score, experience, update))
    generation = sample(policy, prompts, key)
    rows = generation.tokens, generation.segment_ids
    data, _ = jax.jit(experience)(state.params, policy, generation, jnp.zeros(case.rows), state.kl_coef)
    reference = jax.jit(partial(sequence_token_logprobs, model))
    values, score, update = jax.jit(critic), jax.jit(score), jax.jit(update)
    return sum(x.size for x in jax.tree.leaves(policy)), {
        "whole": lambda: whole(frozen, state, rl.PPOBatch(prompts), key),
        "sample": lambda: sample(policy, prompts, key),
        "prefill": lambda: first(policy, prompts, key),
        "reward": lambda: score(frozen, generation),
        "reference": lambda: reference(policy, *rows, generation.completion_mask),
        "values": lambda: values(state.params["critic"], None, *rows),
        "update": lambda: update(state, data, None, jnp.zeros(()), key),
    }


def measured(runs, repeats):
    """Median seconds of each, in turns, after a first run that compiles."""
    seconds = {name: [] for name in runs}
    for i in range(-1, repeats):
        for name, run in runs.items():
            begin = time.perf_counter()
            jax.block_until_ready(run())
            if i >= 0:
                seconds[name].append(time.perf_counter() - begin)
    found = {name: statistics.median(times) for name, times in seconds.items()}
    whole, sample = found.pop("whole"), found.pop("sample")
    prefill = found.pop("prefill")
    return whole, {"prefill": prefill, "decode": sample - prefill, **found}


def draw(path, lines):
    """One bar a network, its parts as shares of their sum."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 2.4), layout="constrained")
    labels = [f"{line['parameters'] / 1e6:.1f}M, {line['rows']}" for line in lines]
    left = np.zeros(len(lines))
    for name in lines[0]["seconds"]:
        share = np.array([100 * line["seconds"][name] / sum(line["seconds"].values()) for line in lines])
        bars = axes.barh(labels, share, left=left, label=name)
        axes.bar_label(bars, [f"{x:.0f}" if x >= 3 else "" for x in share], label_type="center", color="white")
        left += share
    axes.set(xlim=(0, 100), xlabel="% of the time of an iteration's parts")
    axes.invert_yaxis()
    axes.legend(ncols=6, loc="lower center", bbox_to_anchor=(0.5, 1.0), frameon=False)
    figure.savefig(path, dpi=110)


def main(picture, repeats):
    """All cases, then the picture."""
    lines = []
    for name, case in CASES.items():
        size, runs = parts(case)
        whole, seconds = measured(runs, repeats)
        line = {"network": name, "parameters": size, "rows": f"{case.rows} x ({case.prompt} + {case.new}) tokens"}
        line |= {"seconds": {part: round(s, 4) for part, s in seconds.items()}, "whole": round(whole, 4)}
        lines.append(line | {"sum": round(sum(seconds.values()), 4)})
        print(json.dumps(lines[-1]), flush=True)
    if picture:
        draw(picture, lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--picture", help="a PNG to write")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    main(args.picture, args.repeats)

"""What the compiled programs cost, counted and not timed: traces, operations, bytes, temporaries, transfers to the host."""

import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
import tiny
from training.pieces import SIZES, fresh_state, parts

from rlhf_jax.generation.continuous import generate_continuously
from rlhf_jax.generation.generate import generate
from rlhf_jax.objectives import sft
from rlhf_jax.training.ppo import PPOBatch, make_ppo_iteration
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import SequenceBatch

OPTIONS = {"max_new_tokens": 6, "eos_id": tiny.EOS, "pad_id": tiny.PAD}
COUNTS = ("flops", "bytes accessed", "temporaries")
CEILINGS = {
    "PPO iteration": (3_808_064, 5_360_338, 432_560),
    "SFT step": (1_235_754, 1_945_790, 258_952),
    "generate": (563_442, 531_166, 46_512),
    "generate_continuously": (107_043, 200_645, 41_704),
}
"""Of XLA in jax 0.10 with the tests' flags, the body of a loop counted once; temporaries in bytes."""
SLACK = 1.03


class Step(NamedTuple):
    """A function that is to be traced once, and arguments of which nothing but the numbers differs."""

    run: Callable
    first: tuple
    second: tuple


def iteration_step():
    frozen, state = tiny.init_frozen(), fresh_state()
    batches = [PPOBatch(tiny.prompts(sizes, seed=seed)) for seed, sizes in enumerate((SIZES, SIZES[::-1]))]
    later = fresh_state(1).replace(step=jnp.int32(7), kl_coef=jnp.float32(0.3))
    keys = jax.random.key(0), jax.random.key(1)
    second = (tiny.init_frozen(1), later, batches[1], keys[1])
    return Step(make_ppo_iteration(*parts()), (frozen, state, batches[0], keys[0]), second)


def sft_step():
    def batch(seed):
        rows = tiny.prompts(SIZES, width=8, seed=seed)
        return SequenceBatch(rows.tokens, rows.mask.astype(jnp.int32), rows.mask)

    optimizer = optax.adam(1e-2)
    run = make_train_step(sft(tiny.MODEL), optimizer)
    states = [init_train_state(tiny.init_params(seed), optimizer) for seed in (0, 1)]
    return Step(run, (states[0], batch(0)), (states[1].replace(step=jnp.int32(9)), batch(1)))


def sampling_step(sampler, **options):
    def run(params, prompts, key, temperature, limits):
        return sampler(
            tiny.MODEL, params, prompts, key, temperature=temperature, row_limits=limits, **OPTIONS, **options
        )

    def arguments(seed, sizes, temperature, limit):
        prompts, limits = tiny.prompts(sizes, seed=seed), jnp.full((len(sizes),), limit, jnp.int32)
        return tiny.init_params(seed), prompts, jax.random.key(seed), jnp.float32(temperature), limits

    return Step(run, arguments(0, SIZES, 1.0, 6), arguments(1, SIZES[::-1], 0.7, 3))


STEPS = {
    "PPO iteration": iteration_step,
    "SFT step": sft_step,
    "generate": partial(sampling_step, generate),
    "generate_continuously": partial(sampling_step, generate_continuously, num_slots=4),
}


@pytest.fixture(scope="module", params=STEPS)
def played(request):
    """Its name and the compiled program, traced once for two calls: the second may move nothing to or from the device."""
    run, first, second = STEPS[request.param]()
    chex.clear_trace_counter()  # which knows functions by their names

    @jax.jit
    @chex.assert_max_traces(n=1)
    def counted(*args):
        return run(*args)

    jax.block_until_ready(counted(*first))
    with jax.transfer_guard("disallow"):
        jax.block_until_ready(counted(*second))
    return request.param, counted.lower(*first).compile()


def test_nothing_is_traced_twice_and_nothing_leaves_the_device(played):
    """With other prompts, lengths, coefficients, states and keys; the fixture asserts the first half."""
    _, program = played
    text = program.as_text()
    assert not [word for word in ("callback", "infeed", "outfeed", " send(", " recv(") if word in text]


def test_an_iteration_names_its_parts_in_a_trace(played):
    """Nearly every operation that has a name has one of a part: a trace says where the time goes."""
    name, program = played
    if name == "PPO iteration":
        paths = re.findall(r'op_name="jit\(counted\)/([^"]*)"', program.as_text())
        found = Counter(path.split("/")[0] for path in paths)
        assert min(found[part] for part in ("sample", "score", "experience", "update")) > 10
        assert sum(found[part] for part in ("sample", "score", "experience", "update")) > 0.95 * len(paths)


@pytest.mark.skipif(jax.__version_info__[:2] != (0, 10), reason="the ceilings are of XLA in jax 0.10")
def test_programs_cost_no_more_than_they_did(played):
    name, program = played
    cost = program.cost_analysis()
    counts = (int(cost["flops"]), int(cost["bytes accessed"]), program.memory_analysis().temp_size_in_bytes)
    renew = f"renew CEILINGS[{name!r}] with {counts} if that is worth what it brings"
    for what, count, ceiling in zip(COUNTS, counts, CEILINGS[name], strict=True):
        assert count <= SLACK * ceiling, f"{what} of the {name} grew from {ceiling} to {count}: {renew}"


def test_the_cache_of_a_shared_prompt_is_held_once():
    """The temporaries of decoding 8 samples of a prompt of 512 tokens are far below 8 copies of what is held of it."""
    samples, length, new = 8, 512, 4

    def decode(params, cache, token):
        def step(_, carry):
            return tiny.MODEL.hidden(params, token, token, jnp.ones_like(token), carry)[1]

        return jax.lax.fori_loop(0, new, step, tiny.MODEL.fork_cache(cache, samples, new)).keys

    cache = jax.eval_shape(lambda: tiny.MODEL.init_cache(1, length))
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((cache.keys, cache.values)))
    program = jax.jit(decode).lower(tiny.init_params(), cache, jnp.zeros((samples, 1), jnp.int32)).compile()
    assert program.memory_analysis().temp_size_in_bytes < samples * held / 2

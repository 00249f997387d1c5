"""Every step function on meshes of eight fake devices beside one device: `python eight.py OUT.json STEP/MESH ...`.

Each result says how far the numbers are from one device's (the largest difference of a leaf over the leaf's largest
number), whether the sampled tokens are the same, and what the compiled program sends. `state` and `files` look at where
arrays live while a state is born, trained, saved, restored onto another mesh, and read from a checkpoint folder.
"""

import dataclasses
import gc
import json
import os
import re
import sys
import tempfile
import threading
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from rlhf_jax import functional, objectives
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import huggingface, lora, transformer
from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.experts import experts_on
from rlhf_jax.models.heads import head_specs, init_reward_head
from rlhf_jax.models.parameters import ParamSpec, init_params, is_spec
from rlhf_jax.models.ring_attention import ring_attention_on
from rlhf_jax.models.transformer import causal_model
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.collectives import count_collectives
from rlhf_jax.runtime.sharding import (
    constrain_on,
    init_sharded,
    make_mesh,
    named_shardings,
    shard_batch,
    state_shardings,
)
from rlhf_jax.training import ppo, rollout, train_step
from rlhf_jax.types import Experience, Frozen, PreferenceBatch, PromptBatch, RankingBatch, SequenceBatch

V, D, B, T, EOS, PAD = 16, 16, 16, 16, 1, 0
DENSE = TransformerConfig(
    vocab_size=V, num_layers=2, model_dim=D, num_heads=4, num_kv_heads=2, head_dim=4, mlp_dim=32, tie_embeddings=False
)
EXPERTS = dataclasses.replace(DENSE, num_experts=4, mlp_dim=16)
MESHES = {
    "data8": (DENSE, {"data": 8}),
    "fsdp8": (DENSE, {"data": 1, "fsdp": 8}),
    "data2_fsdp2_tensor2": (DENSE, {"data": 2, "fsdp": 2, "tensor": 2}),
    "data2_sequence2_tensor2": (DENSE, {"data": 2, "sequence": 2, "tensor": 2}),
    "data2_ring4": (DENSE, {"data": 2, "sequence": 4}),
    "data2_expert2_fsdp2": (EXPERTS, {"data": 2, "expert": 2, "fsdp": 2}),
}
KEY = jax.random.key


class Case(NamedTuple):
    """A step function with what it needs."""

    specs: Any
    init: Any
    """`init() -> params`."""
    batch: Any
    make: Any
    """`make(model) -> function(params, batch)`."""


def rows(seed, num_rows=B):
    """Tokens, segments and completion masks of rows of several sizes."""
    rng = np.random.default_rng(seed)
    columns, ends = np.arange(T)[None], rng.integers(6, T + 1, (num_rows, 1))
    tokens = rng.integers(2, V, (num_rows, T)).astype(np.int32) * (columns < ends)
    return tokens, (columns < ends).astype(np.int32), (columns >= 4) & (columns < ends)


def pairs():
    """Two answers to each of B prompts."""
    parts = [np.stack(both, axis=1) for both in zip(rows(1), rows(2), strict=True)]
    ref = np.random.default_rng(3).normal(-2, 1, (B, 2, T)).astype(np.float32)
    return PreferenceBatch(*parts, mask=np.arange(B) != 5, ref_logprobs=ref)


def experience():
    rng = np.random.default_rng(4)
    old, advantages, values, returns = rng.normal(size=(4, B, T)).astype(np.float32)
    # Near the policy, returns above values: exponentials of large ratios and sums that cancel have few right digits.
    return Experience(*rows(0), old / 4 - 2.8, advantages, values, returns + 3, ref_logprobs=old / 4 - 2.7)


def prompts():
    rng = np.random.default_rng(5)
    mask = np.arange(4)[None] >= rng.integers(0, 4, (B, 1))
    return PromptBatch((rng.integers(2, V, (B, 4)) * mask).astype(np.int32), mask)


def gradient_of(make_objective):
    """`make(model)` of a function that gives the objective's mean and its gradient."""

    def make(model):
        def mean(params, batch):
            total, weight, _ = make_objective(model)(params, batch)
            return total / weight

        return jax.value_and_grad(mean)

    return make


def iteration_of(model):
    """Rollout and update of PPO, with a score that anyone can count."""
    critic, optimizer = objectives.shared_critic, optax.sgd(0.1)
    step = train_step.make_train_step(objectives.actor_critic(model, critic), optimizer)
    iteration = ppo.make_ppo_iteration(
        partial(generate, model, max_new_tokens=4, eos_id=EOS, pad_id=PAD),
        lambda frozen, generation: (generation.tokens == 7).sum(axis=1).astype(jnp.float32),
        rollout.make_experience_fn(model, critic),
        ppo.make_ppo_update(step, num_epochs=1, num_minibatches=2),
    )

    def run(params, batch):
        state, metrics = iteration(Frozen(params["reference"]), params["state"], ppo.PPOBatch(batch), KEY(6))
        return state.params, {name: metrics[name] for name in ("objective/kl", "objective/scores", "response/len_mean")}

    return run


def cases(config):
    """All step functions for a network."""
    trunk, head = param_specs(config), head_specs(D)
    policy = partial(transformer.init, KEY(0), config)
    adapters = lora.lora_specs(config, rank=2, targets=("query", "down"))
    adapters = jax.tree.map(lambda spec: spec._replace(stddev=0.1), adapters, is_leaf=is_spec)

    def scorer(seed=7):
        return {"trunk": transformer.init(KEY(seed), config), "head": init_reward_head(KEY(seed), D)}

    def actor():
        return {"policy": policy(), "critic": {"head": init_reward_head(KEY(2), D)}}

    def started():
        optimizer = optax.sgd(0.1)
        state = ppo.init_ppo_state(policy(), actor()["critic"], optimizer)
        return {"state": state, "reference": transformer.init(KEY(8), config)}

    def adapted(model):
        def mean(params, batch):
            objective = objectives.sft(lora.adapter_model(model, params["base"], scale=0.5))
            total, weight, _ = objective(params["adapter"], batch)
            return total / weight

        return lambda params, batch: jax.grad(mean)(params, batch)["adapter"]

    def members(model):
        return jax.vmap(gradient_of(objectives.reward_model)(model), in_axes=(0, None))

    tokens, segments, completions = rows(0)
    two = pairs()
    sequences = SequenceBatch(tokens, segments, completions)
    ranks = RankingBatch(
        two.tokens, two.segment_ids, two.completion_mask, np.tile([0, 1], (B, 1)), np.ones((B, 2), bool)
    )
    plain = {**trunk, "head": head}
    stacked = jax.tree.map(lambda spec: ParamSpec((2, *spec.shape), (None, *spec.axes), None), plain, is_leaf=is_spec)
    acted = objectives.PolicyBatch(experience())
    grpo = partial(objectives.policy_gradient, loss_fn=functional.clipped_policy_loss, kl_coef=0.1)
    sample = {"max_new_tokens": 4, "eos_id": EOS, "pad_id": PAD}
    return {
        "sft": Case(plain, policy, sequences, gradient_of(objectives.sft)),
        "reward_model": Case(plain, scorer, ranks, gradient_of(objectives.reward_model)),
        "rollout": Case(plain, policy, prompts(), lambda model: lambda p, x: generate(model, p, x, KEY(9), **sample)),
        "ppo": Case(plain, actor, acted, gradient_of(lambda m: objectives.actor_critic(m, objectives.shared_critic))),
        "iteration": Case(plain, started, prompts(), iteration_of),
        "grpo": Case(plain, lambda: {"policy": policy()}, acted, gradient_of(grpo)),
        "dpo": Case(plain, policy, two, gradient_of(lambda m: objectives.preference(m, functional.dpo_loss, beta=0.1))),
        "lora": Case(
            {**plain, "adapter": adapters},
            lambda: {"base": policy(), "adapter": init_params(KEY(3), adapters)},
            sequences,
            adapted,
        ),
        "ensemble": Case(stacked, lambda: jax.vmap(scorer)(jnp.arange(2)), ranks, members),
    }


def largest_error(ours, exact):
    """Over all leaves: the largest difference over the leaf's largest number; integers must agree."""
    errors = []
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(exact), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        if a.dtype.kind != "f":
            errors.append(0.0 if np.array_equal(a, b) else np.inf)
        else:
            errors.append(float(np.abs(a - b).max() / max(np.abs(b).max(), 1e-30)))
    return max(errors)


def drawn(shapes):
    """Arrays for these shapes without a compilation."""
    rng = np.random.default_rng(10)

    def draw(x):
        return rng.normal(0, 0.3, x.shape).astype(x.dtype) if x.dtype.kind == "f" else np.zeros(x.shape, x.dtype)

    return jax.tree.map(draw, shapes)


def cache_shapes(text, config):
    """Shapes on one device of what is written to and carried through the loop over tokens, an array a layer."""
    found = re.findall(rf"f32\[(\d+,\d+,8,{config.head_dim})\]\S* dynamic-update-slice\(", text)
    return sorted({tuple(int(size) for size in shape.split(",")) for shape in found})


def compare(step, mesh_name, exact):
    """One step function on one mesh; `exact` caches the numbers of one device."""
    config, sizes = MESHES[mesh_name]
    case = cases(config)[step]
    shapes = jax.eval_shape(case.init)
    params = drawn(shapes)
    if (step, config) not in exact:
        exact[step, config] = jax.jit(case.make(causal_model(config)))(params, case.batch)
    mesh = make_mesh(**sizes)
    params = jax.device_put(params, state_shardings(shapes, case.specs, mesh))
    on_mesh = dataclasses.replace(config, constrain_fn=constrain_on(mesh), experts_fn=experts_on(mesh))
    if "ring" in mesh_name:
        on_mesh = dataclasses.replace(on_mesh, attention_fn=ring_attention_on(mesh, tile=2))
    function = jax.jit(case.make(causal_model(on_mesh)))
    batch = shard_batch(case.batch, mesh)
    compiled = function.lower(params, batch).compile()
    return {
        "error": largest_error(compiled(params, batch), exact[step, config]),
        "sent": count_collectives(compiled),
        "sent_in_loops": count_collectives(compiled, in_loops=True),
        "caches": cache_shapes(compiled.as_text(), config),
    }


class Watch:
    """The largest array that stood whole on a device, looked at all the time from a thread of its own."""

    def __init__(self, kinds="biuf"):
        self.largest, self._kinds, self._over = 0, kinds, threading.Event()
        self._thread = threading.Thread(target=self._look)

    def _look(self):
        while not self._over.wait(0.001):
            self.look()

    def look(self):
        for x in jax.live_arrays():
            whole = x.sharding.shard_shape(x.shape) == x.shape
            self.largest = max(self.largest, x.nbytes if whole and x.dtype.kind in self._kinds else 0)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._over.set()
        self._thread.join()
        self.look()


def shardings_of(tree):
    return jax.tree.map(lambda x: x.sharding, tree)


def same(a, b):
    return jax.tree.structure(a) == jax.tree.structure(b) and all(
        np.array_equal(np.asarray(x), np.asarray(y))
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def life_of_a_state(folder):
    """Born on one mesh, trained, saved, restored on another: nothing is ever whole."""
    optimizer, specs = optax.adam(1e-2), param_specs(DENSE)
    batch = SequenceBatch(*rows(0))

    def start():
        return train_step.init_train_state(transformer.init(KEY(0), DENSE), optimizer)

    mesh = make_mesh(**MESHES["fsdp8"][1])
    model = causal_model(dataclasses.replace(DENSE, constrain_fn=constrain_on(mesh)))
    step = jax.jit(train_step.make_train_step(objectives.sft(model), optimizer), donate_argnums=0)
    shardings = state_shardings(jax.eval_shape(start), specs, mesh)
    exact = jax.tree.map(np.array, jax.jit(start)())
    gc.collect()
    with Watch() as watch:
        state = init_sharded(start, specs=specs, mesh=mesh)
        found = {"born_as_declared": shardings_of(state) == shardings, "born_exact": same(state, exact)}
        for _ in range(2):
            state, _ = step(state, shard_batch(batch, mesh))
        found["steps_keep_shardings"] = all(
            x.sharding.is_equivalent_to(sharding, x.ndim)
            for x, sharding in zip(jax.tree.leaves(state), jax.tree.leaves(shardings), strict=True)
        )
        checkpoint.save(folder, 2, state)
        shardings = state_shardings(state, specs, make_mesh(**MESHES["data2_fsdp2_tensor2"][1]))
        like = jax.tree.map(
            lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state, shardings
        )
        restored = checkpoint.restore(folder, like)
        found |= {"restored_exact": same(restored, state), "restored_as_asked": shardings_of(restored) == shardings}
    found |= {"largest_whole": watch.largest, "largest_batch": max(x.nbytes for x in jax.tree.leaves(batch))}
    weights = jax.tree.leaves(exact.params)
    found["largest_parameter"] = max(x.nbytes for x in weights)
    found["bytes_of_parameters"] = sum(x.nbytes for x in weights)
    found["bytes_of_layer"] = sum(x[0].nbytes for x in jax.tree.leaves(exact.params["layers"]))
    return found


def life_of_files(folder):
    """A checkpoint folder read onto a mesh: host memory beside the result, and what stands whole."""
    config = dataclasses.replace(DENSE, num_layers=4, model_dim=256, mlp_dim=512)
    mesh = make_mesh(**MESHES["data2_fsdp2_tensor2"][1])
    params = init_sharded(partial(transformer.init, KEY(0), config), specs=param_specs(config), mesh=mesh)
    huggingface.save(folder, params, huggingface.llama_config(config))
    exact = jax.tree.map(np.array, params)
    del params
    gc.collect()
    tracemalloc.start()
    with Watch() as watch:
        loaded = huggingface.load(folder, shard_fn=partial(named_shardings, mesh=mesh)).params
        peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    held = sum(shard.data.nbytes for x in jax.tree.leaves(loaded) for shard in x.addressable_shards)
    tensors = [x.nbytes // (config.num_layers if x.ndim > 2 else 1) for x in jax.tree.leaves(exact)]
    return {
        "exact": same(loaded, exact),
        "as_asked": shardings_of(loaded) == named_shardings(param_specs(config), mesh),
        "peak_beside_result": peak - held,
        "largest_tensor": max(tensors),
        "largest_parameter": max(x.nbytes for x in jax.tree.leaves(exact)),
        "all_tensors": sum(x.nbytes for x in jax.tree.leaves(exact)),
        "largest_whole": watch.largest,
    }


def main(out, names):
    """The named comparisons, then both lives, as JSON."""
    exact, results = {}, {}
    for name in names:
        results[name] = compare(*name.split("/"), exact)
    with tempfile.TemporaryDirectory() as folder:
        exact.clear()
        results["state"] = life_of_a_state(Path(folder) / "state")
        results["files"] = life_of_files(Path(folder) / "files")
    partial_out = Path(f"{out}.partial")
    partial_out.write_text(json.dumps(results))
    os.replace(partial_out, out)


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_compilation_cache_dir", str(Path(__file__).parents[2] / ".cache" / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    main(Path(sys.argv[1]), sys.argv[2:])

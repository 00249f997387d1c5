"""LoRA: starts as its base, equals the merged network, has the gradients of the chain rule, and shares one base."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models import transformer
from rlhf_jax.models.lora import (
    LowRank,
    adapter_model,
    attach,
    init_lora,
    lora_model,
    lora_specs,
    matrices,
    merge,
    unmerge,
)
from rlhf_jax.models.parameters import is_spec, num_params
from rlhf_jax.models.quantize import quantize
from rlhf_jax.objectives import sft
from rlhf_jax.runtime.sharding import make_mesh, named_shardings
from rlhf_jax.training.optimizers import adam_optimizer
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import SequenceBatch

SCALE = 0.7
TOKENS = jnp.asarray([[3, 7, 2, 9, 4], [5, 6, 3, 8, 0]])
SEGMENTS = jnp.asarray([[1, 1, 1, 1, 1], [1, 1, 1, 1, 0]])
PLAIN = {"gated": False, "layer_norm": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "parallel": True}


CUTS = {"query": ("i", "hc"), "key": ("i", "hc"), "value": ("i", "hc"), "out": ("hi", "o")}


def trained(config=tiny.CONFIG, seed=0, rank=3):
    """An adapter of every matrix whose B is no longer 0."""
    rng = np.random.default_rng(seed)
    specs = lora_specs(config, rank=rank, targets=matrices(config))
    draw = {"a": 0.2, "b": 0.3}
    return {
        name: {part: jnp.asarray(draw[part] * rng.normal(size=spec.shape), jnp.float32) for part, spec in pair.items()}
        for name, pair in specs.items()
    }


def logits_of(model, params):
    states, _ = model.hidden(params, TOKENS, positions_from_segments(SEGMENTS), SEGMENTS)
    return model.unembed(params, states)


def test_starts_as_its_base():
    base = tiny.init_params()
    adapter = init_lora(jax.random.key(1), tiny.CONFIG, rank=2, targets=("query", "down"))
    assert {name: jax.tree.map(jnp.shape, pair) for name, pair in adapter.items()} == {
        "query": {"a": (2, 16, 2), "b": (2, 2, 4, 4)},
        "down": {"a": (2, 24, 2), "b": (2, 2, 16)},
    }
    logits = logits_of(lora_model(tiny.MODEL, scale=SCALE), {"base": base, "adapter": adapter})
    np.testing.assert_allclose(logits, logits_of(tiny.MODEL, base), rtol=1e-6, atol=1e-6)


def test_merge_is_the_formula_and_unmerge_its_inverse():
    base, adapter = tiny.init_params(), trained()
    merged = jax.jit(merge)(base, adapter, scale=SCALE)
    for name in matrices(tiny.CONFIG):
        inputs, outputs = CUTS.get(name, ("i", "o"))
        for layer in range(2):
            weight, pair = base["layers"][name][layer], adapter[name]
            a, b = (np.asarray(pair[part][layer], np.float64) for part in ("a", "b"))
            expected = weight + SCALE * np.einsum(f"{inputs}r,r{outputs}->{inputs}{outputs}", a, b)
            np.testing.assert_allclose(merged["layers"][name][layer], expected, rtol=1e-5, atol=1e-6)
    back = jax.jit(unmerge)(merged, adapter, scale=SCALE)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), back, base)


def test_merge_rounds_once_and_keeps_the_rest():
    adapter = {"up": trained()["up"]}
    half = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tiny.init_params())
    merged = merge(half, adapter, scale=SCALE)
    exact = merge(jax.tree.map(lambda x: x.astype(jnp.float32), half), adapter, scale=SCALE)["layers"]["up"]
    assert merged["layers"]["up"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(merged["layers"]["up"], exact.astype(jnp.bfloat16))
    assert merged["embedding"] is half["embedding"]
    assert all(merged["layers"][name] is weight for name, weight in half["layers"].items() if name != "up")


@pytest.mark.parametrize("changes", [{}, PLAIN, {"num_experts": 3}], ids=["gated", "plain", "experts"])
def test_unmerged_forward_equals_merged(changes):
    config = dataclasses.replace(tiny.CONFIG, **changes)
    model, base = transformer.causal_model(config), transformer.init(jax.random.key(0), config)
    adapter = trained(config)

    @jax.jit
    def three(base, adapter):
        apart = logits_of(lora_model(model, scale=SCALE), {"base": base, "adapter": adapter})
        return apart, logits_of(model, merge(base, adapter, scale=SCALE)), logits_of(model, base)

    apart, merged, without = three(base, adapter)
    np.testing.assert_allclose(apart, merged, rtol=1e-4, atol=2e-5)
    assert np.abs(np.asarray(merged - without)).max() > 0.1


def test_cached_decoding_equals_the_whole_row():
    model = lora_model(tiny.MODEL, scale=SCALE)
    params = {"base": tiny.init_params(), "adapter": trained()}
    positions = positions_from_segments(SEGMENTS)

    @jax.jit
    def both(params):
        whole, _ = model.hidden(params, TOKENS, positions, SEGMENTS)
        cache, parts = model.init_cache(2, 6), []
        for cut in (slice(0, 3), slice(3, 4), slice(4, 5)):
            part, cache = model.hidden(params, TOKENS[:, cut], positions[:, cut], SEGMENTS[:, cut], cache)
            parts.append(part)
        return whole, jnp.concatenate(parts, axis=1)

    whole, parts = both(params)
    mask = np.asarray(SEGMENTS) > 0
    np.testing.assert_allclose(parts[mask], whole[mask], rtol=1e-5, atol=1e-5)


def test_gradient_is_the_chain_rule_and_leaves_the_base():
    base, adapter = tiny.init_params(), trained()

    def loss(model, params):
        return jnp.square(logits_of(model, params)).sum()

    @jax.jit
    def gradients(base, adapter):
        both = lora_model(tiny.MODEL, scale=SCALE)
        of_both = jax.grad(partial(loss, both))({"base": base, "adapter": adapter})
        alone = jax.grad(lambda own: loss(adapter_model(tiny.MODEL, base, scale=SCALE), own))(adapter)
        return of_both, alone, jax.grad(partial(loss, tiny.MODEL))(merge(base, adapter, scale=SCALE))

    of_both, alone, merged = gradients(base, adapter)
    assert all(not leaf.any() for leaf in jax.tree.leaves(of_both["base"]))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-6, atol=1e-6), alone, of_both["adapter"])
    for name, pair in adapter.items():
        g = np.asarray(merged["layers"][name], np.float64)
        inputs, outputs = CUTS.get(name, ("i", "o"))
        of_a = SCALE * np.einsum(f"l{inputs}{outputs},lr{outputs}->l{inputs}r", g, pair["b"])
        of_b = SCALE * np.einsum(f"l{inputs}r,l{inputs}{outputs}->lr{outputs}", pair["a"], g)
        for part, expected in (("a", of_a), ("b", of_b)):
            assert np.abs(expected).max() > 1e-2
            np.testing.assert_allclose(alone[name][part], expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


def test_base_is_shared_not_copied():
    base = tiny.init_params()
    attached = attach(base, trained(), scale=SCALE)
    for name, weight in attached["layers"].items():
        kept = weight.base if isinstance(weight, LowRank) else weight
        assert kept is base["layers"][name], name
    assert attached["embedding"] is base["embedding"]
    assert all(isinstance(attached["layers"][name], LowRank) for name in matrices(tiny.CONFIG))


@pytest.mark.parametrize("changes", [{}, {"dtype": "bfloat16", "remat": True}], ids=["same_dtype", "remat"])
def test_gradient_copies_no_base(changes):
    """Neither merged matrices nor gradients of their shape are ever held: about one layer of four is in use."""
    config = dataclasses.replace(tiny.CONFIG, num_layers=4, model_dim=256, mlp_dim=512, **changes)
    specs = (transformer.param_specs(config), lora_specs(config, rank=2, targets=("gate", "up", "down")))
    base, adapter = (
        jax.tree.map(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), tree, is_leaf=is_spec)
        for tree in specs
    )

    def loss(adapter, base):
        return logits_of(adapter_model(transformer.causal_model(config), base, scale=SCALE), adapter).sum()

    memory = jax.jit(jax.grad(loss)).lower(adapter, base).compile().memory_analysis()
    matrices_of_a_layer = 3 * 256 * 512 * 4
    assert memory.temp_size_in_bytes < 2 * matrices_of_a_layer


def test_vmapped_ensemble_is_the_loop():
    base, adapters, scales = tiny.init_params(), [trained(seed=seed) for seed in range(3)], jnp.asarray([0.5, 1.0, 2.0])

    def logits(base, adapter, scale):
        return logits_of(lora_model(tiny.MODEL, scale=scale), {"base": base, "adapter": adapter})

    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *adapters)
    together = jax.jit(jax.vmap(logits, in_axes=(None, 0, 0)))(base, stacked, scales)
    one = jax.jit(logits)
    apart = [one(base, *pair) for pair in zip(adapters, scales, strict=True)]
    np.testing.assert_allclose(together, np.stack(apart), rtol=1e-4, atol=1e-5)
    assert np.abs(apart[0] - apart[1]).max() > 0.1


def test_train_step_holds_moments_of_the_adapter_alone():
    base, optimizer = tiny.init_params(), adam_optimizer(0.05)
    batch = SequenceBatch(TOKENS, SEGMENTS, (SEGMENTS > 0).at[:, 0].set(False))
    state = init_train_state(init_lora(jax.random.key(0), tiny.CONFIG, rank=2, targets=("query", "up")), optimizer)

    @jax.jit
    def step(base, state):
        return make_train_step(sft(adapter_model(tiny.MODEL, base, scale=2.0)), optimizer)(state, batch)

    losses = []
    for _ in range(8):
        state, metrics = step(base, state)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.8 * losses[0], losses
    size = num_params(state.params)
    assert size == 2 * 2 * (16 + 16 + 16 + 24)
    assert num_params(state.opt_state) < 2 * size + 8


def test_specs_give_scale_and_shardings():
    config = dataclasses.replace(tiny.CONFIG, model_dim=256)
    specs = lora_specs(config, rank=4, targets=matrices(config))
    adapter = init_lora(jax.random.key(0), config, rank=4, targets=matrices(config))
    assert abs(float(adapter["query"]["a"].std()) * 768**0.5 - 1.0) < 0.05  # PEFT: uniform within 1 / sqrt(256)
    assert all(not pair["b"].any() for pair in adapter.values())
    shardings = named_shardings(specs, make_mesh(data=1, fsdp=2))
    placed = jax.device_put(adapter, shardings)
    assert placed["query"]["a"].sharding.shard_shape((2, 256, 4)) == (2, 128, 4)
    experts = lora_specs(dataclasses.replace(tiny.CONFIG, num_experts=3), rank=4, targets=("down",))["down"]
    assert experts["a"].shape == (2, 3, 24, 4)
    assert experts["b"].shape == (2, 3, 4, 16)
    assert experts["b"].axes == ("layers", "expert", None, "embed")


def test_what_does_not_fit_is_refused():
    key, base = jax.random.key(0), tiny.init_params()
    with pytest.raises(ValueError, match="rank must be at least 1, got 0"):
        init_lora(key, tiny.CONFIG, rank=0, targets=("query",))
    for targets in (("query", "q_proj"), "query", (), ("mlp_norm",)):
        with pytest.raises(ValueError, match="targets must be some of"):
            init_lora(key, tiny.CONFIG, rank=2, targets=targets)
    without = {name: weight for name, weight in base["layers"].items() if name != "gate"}
    with pytest.raises(ValueError, match="adapter of 'gate', which the network does not have"):
        attach({**base, "layers": without}, trained(), scale=SCALE)
    wide = trained(dataclasses.replace(tiny.CONFIG, mlp_dim=32))
    for function in (attach, merge):
        with pytest.raises(ValueError, match=r"adapter of gate: .*'b': \(2, 3, 32\).* the network needs"):
            function(base, {"gate": wide["gate"]}, scale=SCALE)
    with pytest.raises(ValueError, match="query is a Quantized, in which the sum has no exact place"):
        merge(quantize(base), trained(), scale=SCALE)

"""8-bit weights: the codes of a plain loop, their error bound, their size, and the same forward."""

import dataclasses
import itertools
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.models import transformer
from rlhf_jax.models.lora import init_lora, lora_model, matrices
from rlhf_jax.models.quantize import Quantized, dequantize, quantize, quantized_shapes
from rlhf_jax.runtime import checkpoint

EXPERTS = dataclasses.replace(tiny.CONFIG, num_experts=3)
INPUTS = {"out": 2}


@pytest.mark.parametrize("config", [tiny.CONFIG, EXPERTS], ids=["dense", "experts"])
def test_codes_are_those_of_a_loop(config):
    params = transformer.init(jax.random.key(0), config)
    params["layers"]["up"] = params["layers"]["up"].at[..., 5].set(0.0)
    coded = quantize(params)
    for name, weight in params["layers"].items():
        if name not in matrices(config):
            assert coded["layers"][name] is weight, name
            continue
        w, code = np.asarray(weight), coded["layers"][name]
        num_shared = 2 if config.num_experts and name in ("gate", "up", "down") else 1
        num_inputs = INPUTS.get(name, 1)
        shared, outputs = w.shape[:num_shared], w.shape[num_shared + num_inputs :]
        assert code.scale.shape == (*shared, *(1,) * num_inputs, *outputs)
        assert code.values.dtype == jnp.int8
        values, scales = np.asarray(code.values, np.float64), np.asarray(code.scale)
        for first in itertools.product(*map(range, shared)):
            for last in itertools.product(*map(range, outputs)):
                channel = (*first, *(slice(None),) * num_inputs, *last)
                scale = np.float32(np.abs(w[channel]).max() / np.float32(127.0)) or np.float32(1.0)
                assert abs(scales[(*first, *(0,) * num_inputs, *last)] / scale - 1) < 1e-6
                off = np.abs(values[channel] - np.clip(np.round(w[channel] / scale), -127, 127))
                assert off.max() <= 1  # a tie may round either way
                assert (off > 0).sum() <= 1
                error = np.abs(w[channel] - values[channel] * scale)
                assert error.max() <= scale * 0.5001
    assert coded["embedding"] is params["embedding"]


def test_a_quarter_of_the_memory():
    params = tiny.init_params()
    coded = quantize(params)["layers"]
    for name in matrices(tiny.CONFIG):
        values, scale = jax.tree.leaves(coded[name])
        assert values.nbytes * 4 == params["layers"][name].nbytes
        assert scale.size * 4 <= values.nbytes * 4 / 16  # one per channel of 16 or more inputs


def logits_of(model, params):
    tokens, segments = jnp.asarray([[3, 7, 2, 9, 4, 0]]), jnp.asarray([[1, 1, 1, 1, 1, 0]])
    states, _ = model.hidden(params, tokens, positions_from_segments(segments), segments)
    return model.unembed(params, states)[:, :5]


@pytest.mark.parametrize("config", [tiny.CONFIG, EXPERTS], ids=["dense", "experts"])
def test_same_forward_with_other_weights(config):
    model, params = transformer.causal_model(config), transformer.init(jax.random.key(0), config)
    run, coded = jax.jit(partial(logits_of, model)), quantize(params)
    exact, close, restored = run(params), run(coded), run(dequantize(coded))
    np.testing.assert_allclose(close, restored, rtol=1e-4, atol=1e-5)
    assert 0 < np.abs(close - exact).max() < 0.05 * np.abs(exact).max()


def test_adapter_on_a_quantised_base():
    base = quantize(tiny.init_params())
    adapter = init_lora(jax.random.key(0), tiny.CONFIG, rank=2, targets=matrices(tiny.CONFIG))
    model = lora_model(tiny.MODEL, scale=1.0)

    @jax.jit
    def gradient(adapter, base):
        return jax.grad(lambda own: logits_of(model, {"base": base, "adapter": own}).sum())(adapter)

    coded, plain = gradient(adapter, base), gradient(adapter, dequantize(base))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-4), coded, plain)
    assert all(np.abs(pair["b"]).max() > 0 for pair in coded.values())


def test_dequantize_restores_arrays():
    params = tiny.init_params()
    restored = dequantize(quantize(params), jnp.bfloat16)
    assert not any(isinstance(x, Quantized) for x in restored["layers"].values())
    assert restored["layers"]["query"].dtype == jnp.bfloat16
    assert restored["layers"]["mlp_norm"] is params["layers"]["mlp_norm"]
    np.testing.assert_allclose(restored["layers"]["out"].astype(jnp.float32), params["layers"]["out"], atol=5e-3)


@pytest.mark.parametrize("config", [tiny.CONFIG, EXPERTS], ids=["dense", "experts"])
def test_checkpoints_hold_quantised_parameters(config, tmp_path):
    """Saved, and restored from shapes alone, next to arrays of other dtypes: the same codes, bit by bit, and logits."""
    params = transformer.init(jax.random.key(0), config)
    state = {"base": quantize(params), "exact": jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)}
    checkpoint.save(tmp_path / "state", 3, state)
    shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
    half = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16), shapes)
    like = {"base": quantized_shapes(shapes), "exact": half}
    assert jax.tree.leaves(like["base"]["layers"]["up"]) == [
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in jax.tree.leaves(state["base"]["layers"]["up"])
    ]
    found = checkpoint.restore(tmp_path / "state", like)
    assert isinstance(found["base"]["layers"]["query"], Quantized)
    assert jax.tree.structure(found) == jax.tree.structure(state)
    assert jax.tree.map(lambda x: x.dtype, found) == jax.tree.map(lambda x: x.dtype, state)
    jax.tree.map(np.testing.assert_array_equal, found, state)
    run = jax.jit(partial(logits_of, transformer.causal_model(config)))
    np.testing.assert_array_equal(run(found["base"]), run(state["base"]))
    with pytest.raises(ValueError, match=r"base/layers/down\b.*float32"):
        checkpoint.restore(tmp_path / "state", {**like, "base": shapes})


def test_what_cannot_be_coded_is_refused():
    params = tiny.init_params()
    with pytest.raises(ValueError, match=r"\w+ is a Quantized, not an array"):
        quantize(quantize(params))
    params["layers"]["down"] = params["layers"]["down"].at[1, 3, 2].set(jnp.nan)
    with pytest.raises(ValueError, match=r"down: weights of layers \[1\] are not finite"):
        quantize(params)

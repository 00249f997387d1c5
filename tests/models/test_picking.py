"""Hidden states where they are read: what is picked from all columns and what no other column was computed for agree."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from rlhf_jax.functional.masking import positions_from_segments
from rlhf_jax.generation.continuous import generate_continuously
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import LayerKind, TransformerConfig
from rlhf_jax.models.attention import blocked_attention
from rlhf_jax.models.heads import init_attribute_head, init_reward_head, sequence_attributes, sequence_scores
from rlhf_jax.models.lora import adapter_model, init_lora, lora_model
from rlhf_jax.models.picking import column_of_row, hidden_at, last_columns
from rlhf_jax.models.quantize import quantize
from rlhf_jax.runtime.flops import matmul_flops

BASE = dataclasses.replace(tiny.CONFIG, num_layers=3, unroll=3)
WINDOWS = {"kinds": (LayerKind(), LayerKind(window=2)), "layer_kinds": (0, 1, 1)}
BIASES = {"layer_norm": True, "qkv_bias": True, "out_bias": True, "mlp_bias": True, "gated": False, "parallel": True}
NETWORKS = {
    "Llama": BASE,
    "one layer": dataclasses.replace(BASE, num_layers=1, unroll=1),
    "windows": dataclasses.replace(BASE, **WINDOWS, post_norm=True, qk_norm=True, attention_softcap=5.0),
    "GPT-NeoX": dataclasses.replace(BASE, **BIASES, num_positions=8, kinds=(LayerKind(rope=None),)),
    "experts": dataclasses.replace(BASE, num_experts=3),
    "remat": dataclasses.replace(BASE, remat=True),
    "blocks": dataclasses.replace(
        BASE, attention_fn=lambda *args, **options: blocked_attention(*args, **options, block=3)
    ),
    "loop": dataclasses.replace(BASE, unroll=1),
}
TOKENS = np.array([[0, 0, 3, 7, 2, 9], [5, 6, 3, 8, 0, 0], [4, 4, 2, 8, 3, 6]])
SEGMENTS = jnp.asarray([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 1]])


def both(config: TransformerConfig):
    return [transformer.causal_model(dataclasses.replace(config, last_layer_where_read=on)) for on in (False, True)]


def close(found, expected, tolerance=1e-5):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=tolerance * max(1.0, float(np.abs(b).max())))


def test_what_is_picked():
    x = jnp.arange(24.0).reshape(2, 4, 3)
    np.testing.assert_array_equal(last_columns(3)(x), x[:, 1:])
    picked = column_of_row(jnp.asarray([2, 0]))
    np.testing.assert_array_equal(picked(x), np.stack([x[0, 2:3], x[1, :1]]))
    np.testing.assert_array_equal(picked(x[:, :, 0]), [[x[0, 2, 0]], [x[1, 0, 0]]])


@pytest.mark.parametrize("name", NETWORKS)
def test_states_and_gradients(name):
    """Of two columns at the end, and of one in each row, padding on either side."""
    config = NETWORKS[name]
    params = jax.jit(lambda: transformer.init(jax.random.key(0), config))()

    def run(model, pick):
        def total(params):
            states, _ = hidden_at(model, params, TOKENS, positions_from_segments(SEGMENTS), SEGMENTS, pick)
            return jnp.sin(states).sum(), states

        return jax.value_and_grad(total, has_aux=True)

    def everything(params):
        picks = (last_columns(2), column_of_row(jnp.asarray([5, 3, 5])))
        return [[run(model, pick)(params) for pick in picks] for model in both(config)]

    plain, narrow = jax.jit(everything)(params)
    close(narrow, plain)


@pytest.mark.parametrize("adapt", ["plain", "lora", "adapter", "quantized"])
def test_scores_and_attributes(adapt):
    """With all forms that a network's params have; a model without `hidden_at` is the plain one."""
    params = jax.jit(lambda: transformer.init(jax.random.key(0), BASE))()
    adapter = jax.tree.map(
        lambda x: x + 0.1, init_lora(jax.random.key(1), BASE, rank=2, targets=("query", "key", "down"))
    )
    forms = {
        "plain": (lambda model: model, params),
        "lora": (lambda model: lora_model(model, scale=0.5), {"base": params, "adapter": adapter}),
        "adapter": (lambda model: adapter_model(model, params, scale=0.5), adapter),
        "quantized": (lambda model: model, quantize(params)),
    }
    wrap, trunk = forms[adapt]
    heads = (init_reward_head(jax.random.key(2), 16), init_attribute_head(jax.random.key(3), 16, 2))

    def read(model):
        scores, attributes = (
            fn(wrap(model), {"trunk": trunk, "head": head}, TOKENS, SEGMENTS)
            for fn, head in zip((sequence_scores, sequence_attributes), heads, strict=True)
        )
        return scores, attributes

    plain, narrow = jax.jit(lambda: [read(model) for model in both(BASE)])()
    close(narrow, plain)
    assert wrap(both(BASE)[0]).hidden_at is None
    assert wrap(both(BASE)[1]).hidden_at is not None


@pytest.mark.parametrize("apart", [16, 0], ids=["apart", "stacked"])
@pytest.mark.parametrize("name", ["Llama", "windows"])
def test_samples(name, apart):
    """The same tokens and log-probs: plain, with shared prompts, and from a queue."""
    config = dataclasses.replace(NETWORKS[name], layers_apart=apart)
    params = jax.jit(lambda: transformer.init(jax.random.key(0), config))()
    options = {"max_new_tokens": 4, "eos_id": tiny.EOS, "pad_id": tiny.PAD}

    def everything():
        for model in both(config):
            for k in (1, 2):
                yield generate(model, params, tiny.prompts(), jax.random.key(1), **options, samples_per_prompt=k)
            yield generate_continuously(model, params, tiny.prompts(), jax.random.key(1), **options, num_slots=2)

    found = jax.jit(lambda: list(everything()))()
    for plain, narrow in zip(found[:3], found[3:], strict=True):
        np.testing.assert_array_equal(plain.tokens, narrow.tokens)
        close(narrow.logprobs, plain.logprobs)


def test_what_is_left_out():
    """Of the last layer all but keys and values; in a loop, nothing."""

    def flops(config, on):
        model, params = both(config)[on], jax.eval_shape(lambda: transformer.init(jax.random.key(0), config))
        trunk = {"trunk": params, "head": jax.eval_shape(lambda: init_reward_head(jax.random.key(0), 16))}
        return matmul_flops(lambda params: sequence_scores(model, params, TOKENS, SEGMENTS), trunk)

    (rows, length), c = TOKENS.shape, BASE
    per_column = c.model_dim * (2 * c.num_heads * c.head_dim + 3 * c.mlp_dim) + 2 * length * c.num_heads * c.head_dim
    assert flops(BASE, 0) - flops(BASE, 1) == 2 * rows * (length - 1) * per_column
    looped = NETWORKS["loop"]
    assert flops(looped, 0) == flops(looped, 1)

"""Operations counted from a trace, against closed forms written here."""

import jax
import jax.numpy as jnp
import pytest
import tiny

import rlhf_jax as rl
from rlhf_jax.runtime.flops import matmul_flops

X, W = jnp.ones((3, 5)), jnp.ones((5, 5))


def product(x):
    return jnp.tanh(x @ W)


@pytest.mark.parametrize(
    ("fn", "times"),
    [
        (product, 1),
        (lambda x: product(x) * 2 + x.sum(), 1),
        (lambda x: (product(x), product(product(x)))[1], 2),  # what nobody reads is left out
        (lambda x: jax.lax.scan(lambda x, _: (product(x), None), x, length=7)[0], 7),
        (lambda x: jax.lax.while_loop(lambda x: jnp.sum(x @ W) < 0, product, x), 8),
        (lambda x: jax.lax.cond(x[0, 0] > 0, product, lambda x: product(product(x)), x), 2),
        (jax.jit(jax.vmap(lambda row: product(row[None])[0])), 1),
        (jax.grad(lambda x: product(x).sum()), 2),
        (jax.grad(lambda x: jax.checkpoint(lambda x: product(product(x)))(x).sum()), 4),  # XLA reuses nothing of it
    ],
)
def test_products_loops_and_recomputation(fn, times):
    assert matmul_flops(fn, X, while_steps=4) == times * 2 * 3 * 5 * 5


def test_batched_and_ragged_products():
    batched = matmul_flops(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), jnp.ones((2, 3, 4)), jnp.ones((2, 4, 5)))
    assert batched == 2 * 2 * 3 * 4 * 5
    rows, matrices, sizes = jnp.ones((6, 4)), jnp.ones((3, 4, 5)), jnp.asarray([1, 2, 3])
    ragged = lambda rows, matrices: jax.lax.ragged_dot(rows, matrices, sizes).sum()  # noqa: E731
    assert matmul_flops(ragged, rows, matrices) == 2 * 6 * 4 * 5
    assert matmul_flops(jax.value_and_grad(ragged, (0, 1)), rows, matrices) == 3 * 2 * 6 * 4 * 5


def dense(num_tokens: int) -> int:
    """Projections and MLPs of the layers."""
    c = tiny.CONFIG
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim
    return 2 * num_tokens * c.num_layers * c.model_dim * (heads + 3 * c.mlp_dim)


def attention(num_rows: int, num_queries: int, num_keys: int) -> int:
    """Queries times keys, and weights times values."""
    c = tiny.CONFIG
    return 2 * 2 * num_rows * num_queries * num_keys * c.num_layers * c.num_heads * c.head_dim


def logits(num_tokens: int) -> int:
    return 2 * num_tokens * tiny.CONFIG.model_dim * tiny.VOCAB


def test_a_training_step_is_three_forwards():
    tokens = jnp.ones((4, 6), jnp.int32)
    batch, params = rl.SequenceBatch(tokens, tokens, tokens > 0), tiny.init_params()
    forward = dense(24) + attention(4, 6, 6) + logits(24)
    assert matmul_flops(rl.sft(tiny.MODEL), params, batch) == forward
    optimizer = rl.adam_optimizer(1e-3)
    state = jax.eval_shape(lambda: rl.init_train_state(params, optimizer))
    step = rl.make_train_step(rl.sft(tiny.MODEL), optimizer, num_micro_batches=2)
    assert matmul_flops(step, state, batch) == 3 * forward


def test_sampling_is_a_prefill_and_a_loop_of_decoding():
    prompts = tiny.prompts()  # 4 rows of 5
    generate = lambda params, key: rl.generate(tiny.MODEL, params, prompts, key, max_new_tokens=7, eos_id=1, pad_id=0)  # noqa: E731
    counted = matmul_flops(generate, tiny.init_params(), jax.random.key(0), while_steps=6)
    prefill = dense(20) + attention(4, 5, 12) + logits(4)
    assert counted == prefill + 6 * (dense(4) + attention(4, 1, 12) + logits(4))

"""Frozen weights in 8 bits: per output channel, symmetric (Jacob et al. 2018, arXiv:1712.05877, §2).

    params = quantize(params)                     # a quarter of float32, half of bfloat16
    model.hidden(params, ...)                     # the same functions; a layer's weights are restored when it runs

For what is only read: reference and reward models, the base of an adapter (`models.lora`), a sampler's copy of the policy.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.lora import MATRICES, split_dims
from rlhf_jax.types import Params

LARGEST = 127
"""Codes are -127, …, 127: symmetric, so that 0 is exact and -w has the code of w, negated."""


@struct.dataclass
class Quantized:
    """The weight `values * scale`: what stands in the place of a matrix in `params["layers"]`."""

    values: jax.Array
    """int8, the shape of the matrix, `[L, (E), in..., out...]`."""
    scale: jax.Array
    """float32 `[L, (E), 1..., out...]`: largest |w| of an output channel, divided by 127."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the matrix."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Of the matrix."""
        return self.values.ndim

    def astype(self, dtype: Any) -> jax.Array:
        """The matrix itself, multiplied in float32 and rounded to `dtype`."""
        return (self.values.astype(jnp.float32) * self.scale).astype(dtype)


def quantize(params: Params) -> Params:
    """Every matrix of the layers as `Quantized`; embeddings, norms, biases and routers stay the arrays they are.

    `scale = max |w| / 127` over the inputs of an output channel and `values = round(w / scale)`, so `|w - values * scale|`
    is at most `scale / 2`. One array at a time, on the devices where it lies. Host code: it looks at the numbers.

    Args:
      params: of a transformer. For a reward model: `{**reward, "trunk": quantize(reward["trunk"])}`.

    Raises:
      ValueError: a weight that is not finite, or quantised already.
    """
    layers = params["layers"]
    return {**params, "layers": {name: _code(name, x) if name in MATRICES else x for name, x in layers.items()}}


def encode(params: Params) -> Params:
    """`quantize` inside `jit`: without a look at the numbers. Of weights that are not finite, the scale is not finite.

    For a sampler whose copy of the policy is made anew in every iteration:

        sample = lambda params, prompts, key: generate(model, encode(params), prompts, key, ...)

    Its log-probs, and so `old_logprobs`, are those of the copy: the ratio of the loss weighs each token with policy / copy
    (see `training.rollout.log_sampling_gap`). XLA's CPU restores the weights before the loop over tokens, so that there
    nothing is gained.
    """

    def code(name: str, weight: jax.Array) -> Any:
        return _encode(weight, split_dims(name, range(weight.ndim))[1]) if name in MATRICES else weight

    return {**params, "layers": {name: code(name, weight) for name, weight in params["layers"].items()}}


def quantized_shapes(shapes: Params) -> Params:
    """The form of `quantize(params)`, to restore it from a checkpoint without the exact parameters.

        shapes = jax.eval_shape(lambda key: transformer.init(key, config), jax.random.key(0))
        reference = checkpoint.restore(folder, quantized_shapes(shapes))

    Args:
      shapes: the tree of `params`, of arrays or `jax.ShapeDtypeStruct`.
    """

    def code(name: str, weight: Any) -> Any:
        if name not in MATRICES:
            return weight
        return jax.eval_shape(partial(_encode, inputs=split_dims(name, range(weight.ndim))[1]), weight)

    return {**shapes, "layers": {name: code(name, weight) for name, weight in shapes["layers"].items()}}


def _code(name: str, weight: Any) -> Quantized:
    if not isinstance(weight, jax.Array):
        raise ValueError(f"{name} is a {type(weight).__name__}, not an array. Fix: quantise plain parameters, once")
    code = _encode(weight, split_dims(name, range(weight.ndim))[1])
    if not jnp.isfinite(code.scale).all():
        bad = sorted({int(layer) for layer in jnp.nonzero(~jnp.isfinite(code.scale))[0]})
        raise ValueError(f"{name}: weights of layers {bad} are not finite. Nothing was quantised. Fix: load them again")
    return code


@partial(jax.jit, static_argnames="inputs")
def _encode(weight: jax.Array, inputs: tuple[int, ...]) -> Quantized:
    exact = weight.astype(jnp.float32)
    largest = jnp.max(jnp.abs(exact), axis=inputs, keepdims=True)
    scale = jnp.where(largest == 0, 1.0, largest / LARGEST)
    return Quantized(jnp.round(exact / scale).astype(jnp.int8), scale)


def dequantize(params: Params, dtype: Any = jnp.float32) -> Params:
    """Plain parameters again: `values * scale` in `dtype`, all else as it is."""
    restored = {name: x.astype(dtype) if isinstance(x, Quantized) else x for name, x in params["layers"].items()}
    return {**params, "layers": restored}

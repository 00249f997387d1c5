"""LoRA (Hu et al. 2021, arXiv:2106.09685): a frozen network plus `scale * A @ B` of low rank on some of its matrices.

    adapter = init_lora(key, config, rank=16, targets=matrices(config))        # {"query": {"a": ..., "b": ...}, ...}
    model = lora_model(causal_model(config), scale=alpha / rank)               # params {"base": ..., "adapter": ...}
    model = adapter_model(causal_model(config), base, scale=alpha / rank)      # params: the adapter alone, for training

An adapter is a pytree of arrays, so it is trained, sharded, saved and `vmap`ped like any other. The base is shared by
reference: it is the reference policy and the trunk of any number of adapters, one copy in memory for all. `scale` is a
number: `alpha / rank` in the paper, `alpha / sqrt(rank)` in rsLoRA (Kalajdzievski 2023, arXiv:2312.03732).

Shapes: L layers, E experts, r rank; `in` and `out` stand for one or two dimensions of a matrix (see `MATRICES`).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from rlhf_jax.models.architecture import TransformerConfig, param_specs
from rlhf_jax.models.parameters import ParamSpec, Specs, init_params
from rlhf_jax.types import CausalModel, Params

MATRICES = {
    "query": (1, 2),
    "key": (1, 2),
    "value": (1, 2),
    "out": (2, 1),
    "gate": (1, 1),
    "up": (1, 1),
    "down": (1, 1),
}
"""The matrices of a layer: how many input and output dimensions each has. Those before them are layers and experts."""


def matrices(config: TransformerConfig) -> tuple[str, ...]:
    """The matrices that the layers of this network have: every possible target."""
    layers = param_specs(config)["layers"]
    return tuple(name for name in MATRICES if name in layers)


def split_dims(name: str, dims: Sequence) -> tuple[tuple, tuple, tuple]:
    """Cut the shape or the axes of a stacked matrix `[L, (E), in..., out...]` into shared, input and output ones."""
    num_inputs, num_outputs = MATRICES[name]
    start, end = len(dims) - num_outputs - num_inputs, len(dims) - num_outputs
    return tuple(dims[:start]), tuple(dims[start:end]), tuple(dims[end:])


def lora_specs(config: TransformerConfig, *, rank: int, targets: Sequence[str]) -> Specs:
    """Every array of an adapter with its shape, logical axes and initialiser, as `transformer.param_specs`.

    `{name: {"a": [L, (E), in..., r], "b": [L, (E), r, out...]}}`. A is normal with the variance 1 / (3 · inputs) that
    PEFT's uniform initialiser has, so that learning rates carry over; B is 0, so that the network starts as its base.

    Raises:
      ValueError: a rank below 1, no target, or one that the network does not have.
    """
    _check_targets(config, targets, rank)
    layers, specs = param_specs(config)["layers"], {}
    for name in targets:
        shared, inputs, outputs = split_dims(name, layers[name].shape)
        shared_axes, input_axes, output_axes = split_dims(name, layers[name].axes)
        specs[name] = {
            "a": ParamSpec(
                (*shared, *inputs, rank), (*shared_axes, *input_axes, None), (3 * math.prod(inputs)) ** -0.5
            ),
            "b": ParamSpec((*shared, rank, *outputs), (*shared_axes, None, *output_axes), 0.0),
        }
    return specs


def _check_targets(config: TransformerConfig, targets: Sequence[str], rank: int) -> None:
    if rank < 1:
        raise ValueError(f"rank must be at least 1, got {rank}")
    known = matrices(config)
    unknown = [name for name in targets if name not in known]
    if isinstance(targets, str) or unknown or not targets:
        raise ValueError(f"targets must be some of {known}, got {targets!r}")


def init_lora(key: jax.Array, config: TransformerConfig, *, rank: int, targets: Sequence[str]) -> Params:
    """A fresh adapter, float32, which changes nothing yet; see `lora_specs`."""
    return init_params(key, lora_specs(config, rank=rank, targets=targets))


@struct.dataclass
class LowRank:
    """The weight `base + a @ b` without the sum: what stands in the place of a matrix in `params["layers"]`.

    `x` goes through `x @ base + (x @ a) @ b`, so neither a second matrix nor its gradient is ever made.
    """

    base: Any
    """`[L, (E), in..., out...]`, an array or a `models.quantize.Quantized`."""
    a: jax.Array  # [L, (E), in..., r]
    b: jax.Array  # [L, (E), r, out...], the scale multiplied in

    def astype(self, dtype: Any) -> "LowRank | jax.Array":
        """The same weight in another dtype; those of experts are summed, layer by layer, as `ragged_dot` needs."""
        num_shared = self.a.ndim + self.b.ndim - 2 - self.base.ndim
        if num_shared:
            return (self.base.astype(jnp.float32) + _product(self.a, self.b, num_shared)).astype(dtype)
        return LowRank(self.base.astype(dtype), self.a.astype(dtype), self.b.astype(dtype))

    def product(self, equation: str, x: jax.Array) -> jax.Array:
        """`einsum(equation, x, weight)`, for an equation that has no letter r."""
        of_inputs, of_output = equation.split("->")
        of_x, of_weight = of_inputs.split(",")
        summed = "".join(letter for letter in of_weight if letter not in of_output)
        kept = "".join(letter for letter in of_weight if letter in of_output)
        rows = "".join(letter for letter in of_x if letter in of_output)
        low = jnp.einsum(f"{of_x},{summed}r->{rows}r", x, self.a)
        return jnp.einsum(equation, x, self.base) + jnp.einsum(f"{rows}r,r{kept}->{of_output}", low, self.b)


def _product(a: jax.Array, b: jax.Array, num_shared: int) -> jax.Array:
    """`a @ b` in float32 over the rank, the first dimensions shared."""
    shared, inputs, outputs = "lme"[:num_shared], "ij"[: a.ndim - num_shared - 1], "op"[: b.ndim - num_shared - 1]
    equation = f"{shared}{inputs}r,{shared}r{outputs}->{shared}{inputs}{outputs}"
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum(equation, a.astype(jnp.float32), b.astype(jnp.float32), precision=exact)


def attach(params: Params, adapter: Params, *, scale: float | jax.Array) -> Params:
    """The same network with `LowRank` weights: `transformer.hidden` takes it like any other.

    No array of `params` is copied.

    Args:
      params: of a transformer; its matrices may be quantised.
      adapter: of any of its matrices.
      scale: of A·B; it may be traced, so that adapters of several scales can be `vmap`ped.

    Raises:
      ValueError: an adapter of a matrix that `params` does not have, or of another shape.
    """
    check_adapter(params, adapter)
    layers = {
        name: LowRank(params["layers"][name], pair["a"], pair["b"] * jnp.asarray(scale, pair["b"].dtype))
        for name, pair in adapter.items()
    }
    return {**params, "layers": {**params["layers"], **layers}}


def check_adapter(params: Params, adapter: Params) -> None:
    """Raise `ValueError` unless every pair of the adapter fits its matrix of `params`."""
    for name, pair in adapter.items():
        if name not in MATRICES or name not in params["layers"]:
            known = [known for known in MATRICES if known in params["layers"]]
            raise ValueError(f"adapter of {name!r}, which the network does not have; its matrices are {known}")
        shared, inputs, outputs = split_dims(name, params["layers"][name].shape)
        rank = pair["a"].shape[-1]
        expected = {"a": (*shared, *inputs, rank), "b": (*shared, rank, *outputs)}
        shapes = {part: array.shape for part, array in pair.items()}
        if shapes != expected:
            raise ValueError(f"adapter of {name}: {shapes}; the network needs {expected}. Fix: load its own adapter")


def lora_model(model: CausalModel, *, scale: float | jax.Array) -> CausalModel:
    """A model with params `{"base": ..., "adapter": ...}`; no gradient reaches the base.

    Stack adapters on a leading dimension for an ensemble on one base:
    `jax.vmap(score, in_axes=({"base": None, "adapter": 0}, None))`.

    Args:
      model: `transformer.causal_model(config)`.
      scale: of A·B.
    """

    def attached(params: Params) -> Params:
        return attach(jax.lax.stop_gradient(params["base"]), params["adapter"], scale=scale)

    return _of_other_params(model, attached, lambda params: jax.lax.stop_gradient(params["base"]))


def _of_other_params(model: CausalModel, to_hidden: Callable, to_unembed: Callable) -> CausalModel:
    """The model with params of another form, from which these make those that its functions read."""

    def of(fn: Callable, convert: Callable) -> Callable:
        return lambda params, *args: fn(convert(params), *args)

    return model._replace(
        hidden=of(model.hidden, to_hidden),
        unembed=of(model.unembed, to_unembed),
        hidden_at=None if model.hidden_at is None else of(model.hidden_at, to_hidden),
    )


def adapter_model(model: CausalModel, base: Params, *, scale: float | jax.Array) -> CausalModel:
    """A model whose params are the adapter alone, so that gradients and optimiser states are as small as it is.

    The backward pass reads the base where it is. Only where it must be converted first (its dtype is not the compute
    dtype, or it is quantised) are the converted matrices of all layers kept, unless `config.remat` is set.

    The base is data: call this inside the jitted function that gets it as an argument, or XLA keeps a copy as a constant.

        @jax.jit
        def step(base, state, batch):
            return make_train_step(sft(adapter_model(model, base, scale=scale)), optimizer)(state, batch)

    Args:
      model: `transformer.causal_model(config)`.
      base: its parameters.
      scale: of A·B.
    """

    def both(adapter: Params) -> Params:
        return {"base": base, "adapter": adapter}

    return _of_other_params(lora_model(model, scale=scale), both, both)


def merge(params: Params, adapter: Params, *, scale: float | jax.Array) -> Params:
    """Plain parameters with `W + scale * A @ B`, summed in float32 and rounded once to the dtype of W.

    The adapted matrices are new arrays, all others the same. For decoding, or to save an ordinary checkpoint.

    Raises:
      ValueError: an adapter that does not fit, or a quantised matrix, which has no exact sum.
    """
    check_adapter(params, adapter)

    def add(name: str, weight: Any) -> jax.Array:
        if not isinstance(weight, jax.Array):
            raise ValueError(
                f"{name} is a {type(weight).__name__}, in which the sum has no exact place. Nothing was merged. Fix: merge "
                "into the full-precision parameters, or `quantize.dequantize` first"
            )
        num_shared = len(split_dims(name, weight.shape)[0])
        delta = scale * _product(adapter[name]["a"], adapter[name]["b"], num_shared)
        return (weight.astype(jnp.float32) + delta).astype(weight.dtype)

    layers = {name: add(name, params["layers"][name]) for name in adapter}
    return {**params, "layers": {**params["layers"], **layers}}


def unmerge(params: Params, adapter: Params, *, scale: float | jax.Array) -> Params:
    """Take a merged adapter out again: the base, to the rounding of its dtype."""
    return merge(params, adapter, scale=-scale)

"""How a tensor of a Hugging Face checkpoint holds one or several of our arrays.

Linear layers of torch are `[out, in]`; ours are `[in..., out...]` with heads apart. Some checkpoints fuse several
matrices into one tensor. A layout says the tensor's shape, takes it apart and puts it together; each is exact.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[int, ...]


class Layout(NamedTuple):
    """Three functions of the shapes of our arrays (without a layer axis)."""

    shape: Callable[[Sequence[Shape]], Shape]
    """The tensor's shape."""
    split: Callable[[np.ndarray, Sequence[Shape]], list[np.ndarray]]
    """Our arrays, views of the tensor where possible."""
    join: Callable[[Sequence[np.ndarray]], np.ndarray]
    """The tensor."""


def _ends(sizes: Sequence[int]) -> np.ndarray:
    return np.cumsum(sizes)[:-1]


def linear(num_inputs: int = 1) -> Layout:
    """`[out, in]`, our arrays one below the other; the first `num_inputs` of our dimensions are inputs, 0 for biases."""

    def columns(shape: Shape) -> Shape:
        return (math.prod(shape[:num_inputs]),) if num_inputs else ()

    def rows(shape: Shape) -> int:
        return math.prod(shape[num_inputs:])

    def tensor_shape(shapes: Sequence[Shape]) -> Shape:
        return (sum(map(rows, shapes)), *columns(shapes[0]))

    def split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
        parts = np.split(tensor, _ends([rows(shape) for shape in shapes]))
        return [part.T.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]

    def join(arrays: Sequence[np.ndarray]) -> np.ndarray:
        return np.concatenate([x.reshape(*columns(x.shape), rows(x.shape)).T for x in arrays])

    return Layout(tensor_shape, split, join)


def conv1d(num_inputs: int = 1) -> Layout:
    """`[in, out]`, our arrays side by side (GPT-2)."""
    other = linear(num_inputs)
    return Layout(
        lambda shapes: other.shape(shapes)[::-1],
        lambda tensor, shapes: other.split(tensor.T, shapes),
        lambda arrays: other.join(arrays).T,
    )


def _per_head_shape(shapes: Sequence[Shape]) -> Shape:
    *inputs, heads, head_dim = shapes[0]
    return (heads * len(shapes) * head_dim, *inputs)


def _per_head_split(tensor: np.ndarray, shapes: Sequence[Shape]) -> list[np.ndarray]:
    *inputs, heads, head_dim = shapes[0]
    apart = tensor.reshape(heads, len(shapes), head_dim, *inputs)
    return [np.moveaxis(apart[:, i], (0, 1), (-2, -1)) for i in range(len(shapes))]


def _per_head_join(arrays: Sequence[np.ndarray]) -> np.ndarray:
    apart = np.stack([np.moveaxis(x, (-2, -1), (0, 1)) for x in arrays], axis=1)
    return apart.reshape(-1, *apart.shape[3:])


per_head = Layout(_per_head_shape, _per_head_split, _per_head_join)
"""`[heads * 3 * head_dim, in]`: query, key and value of the first head, then of the second (GPT-NeoX)."""

same = Layout(lambda shapes: shapes[0], lambda tensor, shapes: [tensor], lambda arrays: arrays[0])
"""The tensor is our array: embeddings, norms."""

"""Matrix products of the shapes of `small`, by XLA and by PyTorch in turns: which of them this machine's cores suit.

    python benchmarks/products.py

One JSON line a shape: GFLOP/s of both, each the median over the turns of the median call, and the median ratio with its range.
Where one library multiplies faster, a comparison of whole tasks starts from there. A process a turn and library, so that the
threads of one do not wait for the other's; PyTorch comes with the extra `parity`.
"""

import dataclasses
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from compare import run
from roofline import seconds
from work import MODELS, Sizes

NETWORK, SIZES = MODELS["small"], Sizes()
TOKENS = SIZES.rows * SIZES.length
SHAPES = {
    "training, up": (TOKENS, NETWORK.model_dim, NETWORK.mlp_dim),
    "training, down": (TOKENS, NETWORK.mlp_dim, NETWORK.model_dim),
    "training, logits": (TOKENS, NETWORK.model_dim, NETWORK.vocab_size),
    "training, gradient of up": (NETWORK.model_dim, TOKENS, NETWORK.mlp_dim),
    "decoding, up": (SIZES.prompts, NETWORK.model_dim, NETWORK.mlp_dim),
    "decoding, logits": (SIZES.prompts, NETWORK.model_dim, NETWORK.vocab_size),
}
"""Rows, what is summed, columns."""


@dataclasses.dataclass(frozen=True)
class Config:
    """Who multiplies."""

    library: Literal["both", "xla", "torch"] = "both"
    """One: its GFLOP/s by shape as one JSON line."""
    turns: int = 5


def multiply_xla(left: np.ndarray, right: np.ndarray) -> Callable[[], Any]:
    """Both on the device, the product compiled."""
    product, operands = jax.jit(lambda x, y: x @ y), (jnp.asarray(left), jnp.asarray(right))
    return lambda: product(*operands)


def multiply_torch(left: np.ndarray, right: np.ndarray) -> Callable[[], Any]:
    """As many threads as it takes by itself."""
    import torch

    operands = torch.from_numpy(left), torch.from_numpy(right)
    return lambda: torch.matmul(*operands)


def rates(multiply: Callable[[np.ndarray, np.ndarray], Callable[[], Any]], calls: int = 30) -> dict[str, float]:
    """GFLOP/s of the median call, shape by shape."""
    found, random = {}, np.random.default_rng(0)
    for name, (rows, summed, columns) in SHAPES.items():
        left, right = (random.standard_normal(shape, np.float32) for shape in ((rows, summed), (summed, columns)))
        product = multiply(left, right)
        times = [seconds(product) for _ in range(calls)]
        found[name] = round(2 * rows * summed * columns / statistics.median(times[1:]) / 1e9, 1)
    return found


def turn(library: str) -> dict[str, float]:
    """In a process of its own."""
    return run([sys.executable, str(Path(__file__)), "--library", library])["value"]


def main(config: Config) -> None:
    """Both in turns, or one."""
    if config.library != "both":
        multiply = {"xla": multiply_xla, "torch": multiply_torch}[config.library]
        print(json.dumps({"lib": config.library, "unit": "GFLOP/s", "value": rates(multiply)}))
        return
    turns = [(turn("xla"), turn("torch")) for _ in range(config.turns)]
    for name, shape in SHAPES.items():
        xla, torch = ([pair[side][name] for pair in turns] for side in (0, 1))
        ratios = [x / y for x, y in zip(xla, torch, strict=True)]
        figures = {"xla_gflops": statistics.median(xla), "torch_gflops": statistics.median(torch)}
        spread = {"ratio": round(statistics.median(ratios), 2), "range": [round(f(ratios), 2) for f in (min, max)]}
        print(json.dumps({"product": name, "shape": shape, **figures, **spread}), flush=True)


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

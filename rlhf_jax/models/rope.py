"""Rotary positions and every scaling of them that published checkpoints use (Su et al. 2021).

Dimension pair i of C turns by `position * base^(-2i/C)` radians; a scaling changes these frequencies, and some also the
length of queries and keys. Frequencies are numbers of the config, computed on the host when a function is traced.

Two scalings depend on how long the text is. transformers looks at each batch for that, so that one text has other
log-probs beside a longer one, and while it is sampled other ones than when it is trained on. Here the length is a field
(`length`, by default at most the original one), and both stay equal.
"""

import dataclasses
import math
from typing import TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

Frequencies: TypeAlias = tuple[np.ndarray, float]
"""Radians per position `[C/2]`, and the factor on cosine and sine."""


def plain_frequencies(base: float, dim: int) -> np.ndarray:
    """`base^(-2i/dim)`, `[dim/2]` float64."""
    return base ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)


@dataclasses.dataclass(frozen=True)
class Linear:
    """Positions divided by `factor` (Chen et al. 2023)."""

    factor: float

    def __call__(self, base: float, dim: int) -> Frequencies:
        """All frequencies smaller by the factor."""
        return plain_frequencies(base, dim) / self.factor, 1.0


@dataclasses.dataclass(frozen=True)
class DynamicNTK:
    """A base that grows with the length of the text beyond `original_length`."""

    factor: float
    original_length: int
    length: int | None = None

    def __call__(self, base: float, dim: int) -> Frequencies:
        """`base * (factor * length / original - (factor - 1))^(dim / (dim - 2))`."""
        length = max(self.length or 0, self.original_length)
        stretch = self.factor * length / self.original_length - (self.factor - 1)
        return plain_frequencies(base * stretch ** (dim / (dim - 2)), dim), 1.0


@dataclasses.dataclass(frozen=True)
class Yarn:
    """Slow pairs interpolated, fast ones kept, a ramp between; queries and keys a little longer (Peng et al. 2023)."""

    factor: float
    original_length: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    """On cosine and sine; None is `mscale` over `mscale_all_dim`, or the paper's `0.1 ln(factor) + 1`."""
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True

    def __call__(self, base: float, dim: int) -> Frequencies:
        """The ramp runs between the pairs that turn `beta_fast` and `beta_slow` times within the original length."""
        low, high = (
            dim * math.log(self.original_length / (turns * 2 * math.pi)) / (2 * math.log(base))
            for turns in (self.beta_fast, self.beta_slow)
        )
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, dim - 1)
        ramp = np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0.0, 1.0)
        fast = plain_frequencies(base, dim)
        return fast / self.factor * ramp + fast * (1 - ramp), self._length_of_cosine()

    def _length_of_cosine(self) -> float:
        def scale(weight: float) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * weight * math.log(self.factor) + 1.0

        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale(1.0)


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A searched divisor for every pair, one list for short texts and one for long ones (Ding et al. 2024)."""

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    factor: float
    attention_factor: float | None = None
    length: int | None = None

    def __call__(self, base: float, dim: int) -> Frequencies:
        """Cosine and sine grow by `sqrt(1 + ln factor / ln original_length)`."""
        divisors = np.array(self.long if (self.length or 0) > self.original_length else self.short, np.float64)
        if divisors.shape != (dim // 2,):
            raise ValueError(f"LongRoPE has {divisors.size} divisors for {dim // 2} pairs of rotary dimensions")
        grow = 1.0 if self.factor <= 1 else math.sqrt(1 + math.log(self.factor) / math.log(self.original_length))
        return plain_frequencies(base, dim) / divisors, grow if self.attention_factor is None else self.attention_factor


@dataclasses.dataclass(frozen=True)
class Llama3:
    """Wavelengths above `original / low` divided, below `original / high` kept, a ramp between (Llama 3.1)."""

    factor: float
    low_frequency_factor: float
    high_frequency_factor: float
    original_length: int

    def __call__(self, base: float, dim: int) -> Frequencies:
        """The ramp is linear in turns within the original length."""
        frequencies = plain_frequencies(base, dim)
        turns = self.original_length * frequencies / (2 * math.pi)
        keep = (turns - self.low_frequency_factor) / (self.high_frequency_factor - self.low_frequency_factor)
        keep = np.clip(keep, 0.0, 1.0)
        return (1 - keep) * frequencies / self.factor + keep * frequencies, 1.0


Scaling: TypeAlias = Linear | DynamicNTK | Yarn | LongRope | Llama3


@dataclasses.dataclass(frozen=True)
class Rope:
    """How positions turn queries and keys."""

    base: float = 10_000.0
    fraction: float = 1.0
    """Share of each head's dimensions that turn, the first ones."""
    scaling: Scaling | None = None

    def rotary_dim(self, head_dim: int) -> int:
        """Dimensions that turn."""
        return int(head_dim * self.fraction)

    def frequencies(self, head_dim: int) -> Frequencies:
        """Radians per position of each pair, and the factor on cosine and sine."""
        dim = self.rotary_dim(head_dim)
        return (plain_frequencies(self.base, dim), 1.0) if self.scaling is None else self.scaling(self.base, dim)


def rotation(positions: jax.Array, rope: Rope, head_dim: int) -> tuple[jax.Array, jax.Array]:
    """Cosine and sine `[B, T, 1, R/2]`, float32, of the angles of `positions [B, T]`; R rotary dimensions."""
    frequencies, factor = rope.frequencies(head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies.astype(np.float32)[None, None, None, :]
    return factor * jnp.cos(angles), factor * jnp.sin(angles)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Turn the pairs (i, i + R/2) of the first R dimensions of `x [B, T, N, C]`, in float32; the others stay."""
    size = 2 * cos.shape[-1]
    first, second, rest = jnp.split(x.astype(jnp.float32), [size // 2, size], axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=-1).astype(x.dtype)

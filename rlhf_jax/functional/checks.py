"""Refusals of hyper-parameters that cannot be meant.

Only Python and NumPy numbers are compared: a traced value (a coefficient that is `vmap`ped over, say) has
none while the program is built, and reading one from a device would make the host wait.
"""

import math
from numbers import Real

from jaxtyping import ScalarLike


def check_between(low: float, high: float, **hyper_parameters: ScalarLike) -> None:
    """Raise ValueError unless `low <= value <= high` for every named number; NaN is refused too."""
    for name, value in hyper_parameters.items():
        if isinstance(value, Real) and not low <= value <= high:
            bounds = f"at least {low}" if math.isinf(high) else f"within [{low}, {high}]"
            raise ValueError(f"{name} must be {bounds}, got {value}")


def check_positive(**hyper_parameters: ScalarLike) -> None:
    """Raise ValueError unless `0 < value < inf` for every named number; NaN is refused too."""
    for name, value in hyper_parameters.items():
        if isinstance(value, Real) and not 0 < value < math.inf:
            raise ValueError(f"{name} must be positive and finite, got {value}")

"""Memory that the compiler leaves in the heap of this process, given back to the machine."""

import ctypes
import functools
from typing import Any

import jax

COMPILED = "/jax/core/compile/backend_compile_duration"
"""What JAX reports when a program has been compiled, or read from where programs are kept, and before it runs."""


@functools.cache
def give_back_after_compiling() -> None:
    """From now on, pages of the C heap on which nothing lies go back to the machine as soon as a program is compiled.

    A compiler's passes fill the heap with small blocks and free them; the C library keeps their pages, and the program
    then takes its arrays from elsewhere: without this, a process's peak is what compiling took and what running takes.
    Where the C library has no `malloc_trim` (it is glibc's), nothing happens. Calling it again changes nothing.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return

    def give_back(event: str, seconds: float, **_: Any) -> None:
        if event == COMPILED:
            trim(0)

    jax.monitoring.register_event_duration_secs_listener(give_back)

"""Free pages of the heap leave the process when a program has been compiled."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

BLOCK, BLOCKS = 64 * 1024, 2000


def resident():
    """Bytes of this process that lie in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def freed_by_a_compilation():
    """Bytes by which the process shrinks while it compiles, with a hole of 128 MB in its heap."""
    import jax

    jax.jit(lambda x: x * 2)(1)  # what starting takes is not counted
    libc = ctypes.CDLL(None)
    libc.malloc.restype, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    blocks = [libc.malloc(BLOCK) for _ in range(BLOCKS)]
    for block in blocks:
        ctypes.memset(block, 1, BLOCK)
    for block in blocks[:-1]:  # the last one keeps the C library from cutting off the heap's end
        libc.free(block)
    before = resident()
    jax.jit(lambda x: x + 1)(1)
    return before - resident()


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="the C library is not glibc")
@pytest.mark.parametrize("asked", [0, 1, 2], ids="{} times asked for".format)
def test_pages_go_back_when_a_program_is_compiled(asked):
    code = (
        "from tests.runtime.test_heap import freed_by_a_compilation\n"
        "from rlhf_jax.runtime.heap import give_back_after_compiling\n"
        f"for _ in range({asked}): give_back_after_compiling()\n"
        "print(freed_by_a_compilation())"
    )
    root = Path(__file__).resolve().parents[2]
    freed = int(subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, check=True).stdout)
    hole = BLOCK * (BLOCKS - 1)
    assert (freed > 0.7 * hole) if asked else (freed < 0.3 * hole)

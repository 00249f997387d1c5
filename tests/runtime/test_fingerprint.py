"""The fingerprint: a numpy loop's number, every bit counts, no mesh does."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from rlhf_jax.runtime.fingerprint import fingerprint, measure, short
from rlhf_jax.runtime.sharding import make_mesh

DTYPES = ("float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "int8", "uint16", "bool", "complex64")


def by_loop(words):
    """Python integers, written from the formula."""
    keep = 0xFFFFFFFF

    def mix(h):
        h = (h ^ (h >> 16)) * 0x85EBCA6B & keep
        h = (h ^ (h >> 13)) * 0xC2B2AE35 & keep
        return h ^ (h >> 16)

    seeds = (0x243F6A88, 0x85A308D3)
    sums = [sum(mix(b ^ mix((i * 0x9E3779B1 + s) & keep)) for i, b in enumerate(words)) & keep for s in seeds]
    return f"{sums[0]:08x}{sums[1]:08x}"


def random_bits(dtype, shape=(3, 5, 2)):
    rng = np.random.default_rng(0)
    if dtype == "bool":
        return rng.random(shape) < 0.5
    count = int(np.prod(shape)) * jnp.dtype(dtype).itemsize
    return np.frombuffer(rng.bytes(count), jnp.dtype(dtype)).reshape(shape)


@pytest.mark.parametrize("dtype", [*DTYPES, "float64", "int64"])
def test_the_formula_word_by_word(dtype):
    """Random bits, NaNs with payloads among them; 64-bit arrays are numpy's, which a device would narrow."""
    array = random_bits(dtype)
    size = array.dtype.itemsize
    words = array.reshape(-1).view({1: np.uint8, 2: np.uint16}.get(size, np.uint32)).tolist()
    wanted = by_loop(words)
    assert fingerprint({"x": array}) == {"x": wanted}
    if size < 8 or dtype == "complex64":
        assert fingerprint({"x": jnp.asarray(array)}) == {"x": wanted}


def test_64_bits_on_the_device():
    with jax.enable_x64(True):
        for dtype in ("float64", "int64"):
            array = random_bits(dtype)
            assert jnp.asarray(array).dtype == dtype
            assert fingerprint([jnp.asarray(array)]) == fingerprint([array])


def test_every_single_bit_counts():
    array = random_bits("float32", (4, 4))
    seen = {fingerprint([array])["0"]}
    for place in range(16):
        for bit in range(32):
            words = array.view(np.uint32).copy()
            words.reshape(-1)[place] ^= np.uint32(1 << bit)
            seen.add(fingerprint([words.view(np.float32)])["0"])
    assert len(seen) == 1 + 16 * 32


def test_zeros_nans_and_swaps_are_told_apart():
    nans = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    arrays = [np.zeros(2, np.float32), -np.zeros(2, np.float32), nans, nans[::-1].copy(), np.zeros(3, np.float32)]
    assert len({fingerprint([jnp.asarray(x)])["0"] for x in arrays}) == len(arrays)


def test_no_mesh_and_no_layout_changes_it():
    tree = {"w": random_bits("float32", (4, 6)), "b": random_bits("bfloat16", (8, 2))}
    wanted = fingerprint(tree)
    mesh = make_mesh(data=1, fsdp=2)
    for spec in (PartitionSpec(), PartitionSpec("fsdp"), PartitionSpec(None, "fsdp")):
        placed = jax.device_put(tree, NamedSharding(mesh, spec))
        assert len(placed["w"].sharding.device_set) == 2
        assert fingerprint(placed) == wanted
    assert fingerprint(jax.device_put(tree, jax.devices()[1])) == wanted
    transposed = jax.jit(lambda x: x.T)(jnp.asarray(tree["w"].T.copy()))
    assert fingerprint({"w": transposed})["w"] == wanted["w"]


def test_finite_is_measured_with_it():
    tree = {
        "ok": jnp.ones(3),
        "inf": jnp.array([1.0, jnp.inf]),
        "n": np.array([np.nan, 1.0]),
        "i": jnp.ones(2, jnp.int8),
    }
    assert {name: finite for name, (*_, finite) in measure(tree).items()} == {
        "ok": True,
        "inf": False,
        "n": False,
        "i": True,
    }


def test_the_short_form_sees_names_shapes_and_dtypes():
    x = jnp.arange(6, dtype=jnp.int32)
    trees = [{"a": x}, {"b": x}, {"a": x.reshape(2, 3)}, {"a": x.astype(jnp.uint32)}, {"a": x + 1}]
    assert len({short(tree) for tree in trees}) == len(trees)
    assert short({"a": x, "c": x}) == short({"c": x, "a": jnp.copy(x)})


def test_names_that_meet_are_refused():
    with pytest.raises(ValueError, match="two leaves are spelled alike: a/b"):
        fingerprint({"a/b": jnp.ones(1), "a": {"b": jnp.ones(1)}})

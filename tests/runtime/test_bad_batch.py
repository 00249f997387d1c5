"""A dumped batch comes back bit for bit, is data only, and what is no batch is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime.bad_batch import dump_batch, load_batch
from rlhf_jax.types import PromptBatch


def test_every_bit_comes_back(tmp_path):
    batch = {
        "prompts": PromptBatch(tokens=np.arange(6, dtype=np.int32).reshape(2, 3), mask=np.ones((2, 3), bool)),
        "half": jnp.asarray([1.5, jnp.nan, -0.0], jnp.bfloat16),
        "scalar": jnp.float32(jnp.inf),
        "empty": np.zeros((0, 3), np.float64),
    }
    path = dump_batch(tmp_path, 57, batch)
    assert path == tmp_path / "bad_batch_57.npz"
    back = load_batch(path, jax.eval_shape(lambda: jax.tree.map(jnp.asarray, batch)))
    assert isinstance(back["prompts"], PromptBatch)
    for x, y in zip(jax.tree.leaves(batch), jax.tree.leaves(back), strict=True):
        assert (x.shape, x.dtype, np.asarray(x).tobytes()) == (y.shape, y.dtype, y.tobytes())
    assert sorted(load_batch(path)) == ["empty", "half", "prompts/mask", "prompts/tokens", "scalar"]


def test_only_numbers_go_in(tmp_path):
    for leaf, kind in (("text", "str"), (jax.random.key(0), "key<fry>"), (np.array(["a", None]), "object")):
        with pytest.raises(ValueError, match=f"batch x is a {kind}, only arrays of numbers are written"):
            dump_batch(tmp_path, 1, {"x": leaf})
    assert not list(tmp_path.iterdir())


def test_what_is_no_batch_is_refused(tmp_path):
    path = dump_batch(tmp_path, 1, {"x": np.arange(100)})
    with pytest.raises(ValueError, match=r"holds \['x'\], wanted \['y'\]: a batch of another stage"):
        load_batch(path, {"y": 0})
    whole = path.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"PK\x03\x04" + bytes(50), b"hello"):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match=r"bad_batch_1\.npz is no batch that a run left behind, nothing was loaded"
        ):
            load_batch(path)
    with path.open("wb") as file:
        np.savez(file, x=np.arange(3))
    with pytest.raises(ValueError, match="is no batch that a run left behind"):
        load_batch(path)
    with path.open("wb") as file:
        np.savez(file, __forms__=np.array([{"x": "object"}], object))  # a pickle inside
    with pytest.raises(ValueError, match="is no batch that a run left behind"):
        load_batch(path)
    with pytest.raises(FileNotFoundError):
        load_batch(tmp_path / "none.npz")

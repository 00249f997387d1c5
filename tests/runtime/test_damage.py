"""Checkpoints with altered, cut, emptied or missing files: found every time, told, and survived by the older step."""

import errno
import gc
import re
import shutil
from collections import namedtuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.runtime import checkpoint, faults, record
from rlhf_jax.runtime.record import DamagedCheckpointError

STATE = {
    "w": jnp.arange(48, dtype=jnp.float32).reshape(6, 8) / 7,
    "n": {"b": jnp.ones(5, jnp.bfloat16), "i": jnp.arange(3)},
}

pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def plus(step):
    return jax.tree.map(lambda x: x + step, STATE)


def same(a, b):
    return all(
        np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


@pytest.fixture(autouse=True, scope="module")
def _what_orbax_drops_over_damaged_files():
    """Its readers leave coroutines behind that warn when they are collected: here, and not during some later test."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved") / "c"
    for step in (1, 2):
        checkpoint.save(folder, step, plus(step), notes={"loss": 0.5, "step": step})
    return folder


def flip(data):
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 4]) + data[middle + 1 :]


DAMAGE = {
    "flipped": flip,
    "flipped at its end": lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    "cut": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"\0",
    "empty": lambda data: b"",
    "zeroed": lambda data: bytes(len(data)),
    "deleted": None,
}


def damaged_copies(saved, tmp_path):
    """Every file of step 2 in every way, one after the other."""
    for source in sorted(path for path in (saved / "2").rglob("*") if path.is_file()):
        for how, change in DAMAGE.items():
            folder = tmp_path / "c"
            shutil.rmtree(folder, ignore_errors=True)
            shutil.copytree(saved, folder)
            path = folder / source.relative_to(saved)
            if change is None:
                path.unlink()
            else:
                path.write_bytes(change(path.read_bytes()))
            yield folder, path, how


def test_every_damage_to_every_file_is_found_and_named(saved, tmp_path):
    tried = 0
    for folder, path, how in damaged_copies(saved, tmp_path):
        with pytest.raises(DamagedCheckpointError, match=r"step 2 is damaged: ") as error:
            checkpoint.restore(folder, STATE, step=2)
        assert str(path) in str(error.value), how
        tried += 1
    assert tried >= 7 * 10


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # readers that Orbax leaves behind
def test_array_data_too_large_to_hash_is_checked_by_its_bits(saved, tmp_path, monkeypatch):
    """No file's hash is looked at: sizes, Orbax and the fingerprint find it, or nothing that was read differs."""
    monkeypatch.setattr(record, "HASHED_BYTES", -1)
    found = harmless = 0
    for folder, path, how in damaged_copies(saved, tmp_path):
        try:
            state = checkpoint.restore(folder, STATE, step=2)
        except DamagedCheckpointError:
            found += 1
        else:
            assert same(state, plus(2)), f"{path} {how}: other values, and nobody said so"
            harmless += 1
    assert found > harmless > 0


def test_a_changed_value_is_named_by_its_leaf(saved, tmp_path, monkeypatch):
    """The same bytes everywhere, but arrays of another step: only the fingerprint can see that."""
    monkeypatch.setattr(record, "_check_files", lambda folder, files: None)
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    other = {**STATE, "n": {**STATE["n"], "i": STATE["n"]["i"] + 1}}
    checkpoint.save(tmp_path / "d", 2, jax.tree.map(lambda x: x + 2, other))
    shutil.rmtree(folder / "2" / "state")
    shutil.copytree(tmp_path / "d" / "2" / "state", folder / "2" / "state")
    with pytest.raises(DamagedCheckpointError, match=r"^step 2 fails its fingerprint at n/i$"):
        checkpoint.restore(folder, STATE, step=2)


def test_the_older_step_takes_over_and_says_so(saved, tmp_path, capsys):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    (folder / "2" / "state" / "_METADATA").write_bytes(b"{}")
    assert same(checkpoint.restore(folder, STATE), plus(1))
    told = capsys.readouterr().err
    assert re.fullmatch(r"step 2 is damaged: .*_METADATA has 2 bytes, \d+ were written; using step 1\n", told)
    assert [path.name for path in checkpoint.set_aside(folder, 1)] == ["2.damaged"]
    checkpoint.save(folder, 2, plus(2))
    (folder / "2" / "record.json").unlink()
    assert checkpoint.read_notes(folder)["step"] == 1
    assert [path.name for path in checkpoint.set_aside(folder, 1)] == ["2.damaged1"]
    (folder / "1" / "record.json").unlink()
    with pytest.raises(DamagedCheckpointError, match=r"no step in .*c is whole, nothing was loaded: step 1 is damaged"):
        checkpoint.restore(folder, STATE)


def test_a_checkpoint_without_a_record_is_read_unchecked_and_says_so(saved, tmp_path, capsys):
    """Format 1: notes in a folder of their own, nothing to compare with."""
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    (folder / "2" / "record.json").unlink()
    (folder / "2" / "notes").mkdir()
    (folder / "2" / "notes" / "metadata").write_text('{"loss": 0.25}')
    assert checkpoint.read_notes(folder) == {"loss": 0.25}
    assert same(checkpoint.restore(folder, STATE), plus(2))
    assert "is of format 1, which has no record: its bytes cannot be checked" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"w: stored float32\[6, 8\], wanted float32\[2\]"):
        checkpoint.restore(folder, {**STATE, "w": jnp.zeros(2)})


def test_a_newer_format_is_refused(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(record, "FORMAT", 3)
    checkpoint.save(tmp_path / "c", 1, STATE)
    monkeypatch.setattr(record, "FORMAT", 2)
    with pytest.raises(ValueError, match="has format 3, this version reads up to 2: update rlhf_jax"):
        checkpoint.restore(tmp_path / "c", STATE)


def test_a_number_that_is_none_is_not_saved(saved, tmp_path):
    folder = tmp_path / "c"
    shutil.copytree(saved, folder)
    bad = {**STATE, "w": STATE["w"].at[2, 2].set(jnp.nan)}
    with pytest.raises(FloatingPointError, match=r"step 3 is not finite at w, not saved; last good step 2 is kept"):
        checkpoint.save(folder, 3, bad)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2"]


def test_too_little_space_is_told_before_a_byte_is_written(tmp_path, monkeypatch):
    checkpoint.save(tmp_path / "c", 1, STATE)
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9 - 1000, 1000))
    with pytest.raises(
        OSError, match=r"step 2 needs 0\.00105 GB, 1e-06 GB are free on .*; last good step 1 is kept"
    ) as error:
        checkpoint.save(tmp_path / "c", 2, STATE)
    assert error.value.errno == errno.ENOSPC
    assert [path.name for path in (tmp_path / "c").iterdir()] == ["1"]


@pytest.mark.parametrize(
    ("point", "kept"), [("mid_save", ["1", "2"]), ("before_commit", ["1", "2"]), ("after_commit", ["1", "2", "3"])]
)
@pytest.mark.parametrize("action", ["enospc", "raise"])
def test_a_save_that_fails_leaves_the_older_steps(tmp_path, point, kept, action):
    """The failure is told by the next call, own leftovers are gone, and the step can be saved again."""
    folder = tmp_path / "c"
    for step in (1, 2):
        checkpoint.save(folder, step, plus(step))
    with faults.injected(f"{point}@1={action}") as visits, checkpoint.writer(folder) as to:
        to.save(3, plus(3))
        with pytest.raises((OSError, faults.InjectedFaultError), match=f"injected: {point}@1={action}") as error:
            to.wait()
        if point != "after_commit":
            assert "step 3 was not saved in" in str(error.value)
            assert "last good step 2 is kept" in str(error.value)
        assert sorted(path.name for path in folder.iterdir()) == kept
        to.save(4, plus(4))
        to.wait()
        assert sorted(path.name for path in folder.iterdir()) == sorted([*kept[-1:], "4"])
    assert visits[point] == 2
    assert same(checkpoint.restore(folder, STATE), plus(4))


def test_a_donated_state_is_saved_as_it_was(tmp_path):
    """The save returns while bytes are still being written; the step that follows reuses the state's memory."""
    step = jax.jit(lambda state: jax.tree.map(lambda x: x * 0 - 1, state), donate_argnums=0)
    state = {"w": jnp.arange(200_000, dtype=jnp.float32)}
    wanted = np.asarray(state["w"]).copy()
    with checkpoint.writer(tmp_path / "c") as to:
        to.save(1, state)
        for _ in range(3):
            state = step(state)
        jax.block_until_ready(state)
    np.testing.assert_array_equal(checkpoint.restore(tmp_path / "c", {"w": jnp.zeros(200_000)})["w"], wanted)


def test_never_fewer_than_two_and_every_nth_for_good(tmp_path):
    with pytest.raises(ValueError, match="keep 1: at least two steps stay"):
        checkpoint.save(tmp_path / "c", 1, STATE, keep=1)
    counted = []
    with checkpoint.writer(tmp_path / "c", for_good=4) as to:
        for step in range(1, 8):
            to.save(step, STATE)
            to.wait()
            counted.append(sorted(int(path.name) for path in (tmp_path / "c").iterdir()))
    assert counted[-1] == [4, 6, 7]
    assert all(len(steps) >= 2 for steps in counted[1:])

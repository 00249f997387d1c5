"""Disks that are really full and really read-only: one clear line, older steps intact. Needs the right to mount."""

import contextlib
import os
import subprocess

import pytest
from runtime.test_kill import outcome, play

from rlhf_jax.runtime.checkpoint import latest_step


@contextlib.contextmanager
def mounted(folder, options):
    """A file system in memory at `folder`, for the time of the `with`."""
    folder.mkdir(exist_ok=True)
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip(f"may not mount: {done.stderr.decode().strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="may not mount")


@needs_root
def test_a_read_only_folder_is_told_before_anything_starts(tmp_path):
    with mounted(tmp_path / "disk", "size=2m,ro") as disk:
        code, out, err = play(disk / "run")
    assert code == 1
    assert out == ""
    last = err.strip().splitlines()[-1]
    assert f"cannot write to {disk / 'run'} (Read-only file system); nothing was started. Fix: choose another" in last


@needs_root
def test_a_disk_of_two_megabytes_fills_up_and_the_older_steps_stay(tmp_path):
    """The check before the save tells it; with room again the same command ends as if nothing had been."""
    with mounted(tmp_path / "disk", "size=2m") as disk:
        run, ballast = disk / "run", disk / "ballast"
        code, _, err = play(run, "--steps", "12", "--for-good", "1")
        assert code == 0, err
        for name in ("final.bin", "final.json", "state/sft/12", "state/sft/9"):
            subprocess.run(["rm", "-rf", str(run / name)], check=True)
        free = os.statvfs(disk)
        ballast.write_bytes(bytes(free.f_bavail * free.f_bsize - 2**17))
        code, _, err = play(run, "--steps", "24")
        assert code == 1
        last = err.strip().splitlines()[-1]
        assert "OSError: [Errno 28] step 9 needs " in last
        assert "GB are free on" in last
        assert "last good step 6 is kept. Fix: free some space, then resume" in last
        assert latest_step(run / "state" / "sft") == 6
        ballast.unlink()
        code, _, err = play(run, "--steps", "12")
        assert code == 0, err
        assert "sft: resumed after 6 steps" in err
        ended = outcome(run)
    assert play(tmp_path / "elsewhere", "--steps", "12")[0] == 0
    assert ended == outcome(tmp_path / "elsewhere")

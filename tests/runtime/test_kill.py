"""Runs in processes of their own that are killed, stopped, starved and misled, and end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.bad_batch import load_batch
from rlhf_jax.runtime.runs import read_json_lines

LOOP = Path(__file__).with_name("loop.py")

NAMED = (
    "before_update@2",
    "after_update@3",
    "log_write@2",
    "before_save@1",
    "mid_save@2",
    "before_commit@1",
    "after_commit@1",
    "mid_prune@1",
)


def start(run, *options, faults="", **kwargs):
    variables = {"RLHF_JAX_FAULTS": faults, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    command = [sys.executable, str(LOOP), str(run), *options]
    return subprocess.Popen(
        command,
        env={**os.environ, **variables},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **kwargs,
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def play(run, *options, faults=""):
    return finish(start(run, *options, faults=faults))


def outcome(run):
    """Everything that a run leaves but its clock."""
    rows = [
        {name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")}
        for row in read_json_lines(run / "metrics.jsonl")
    ]
    return (run / "final.bin").read_bytes(), (run / "final.json").read_bytes(), json.dumps(rows)


@pytest.fixture(scope="module")
def untouched(tmp_path_factory):
    """The folder of a run that nobody disturbed, every checkpoint kept."""
    run = tmp_path_factory.mktemp("untouched") / "run"
    code, _, err = play(run, "--for-good", "1")
    assert code == 0, err
    return run


def kill_at(run, fault):
    code, _, err = play(run, faults=f"{fault}=kill9")
    assert code == -signal.SIGKILL, f"{fault}: {err}"
    assert f"injected: {fault}=kill9" in err


def kill_within(run, seconds):
    """SIGKILL that long after the first step; False when the run was faster."""
    process = start(run)
    with process.stdout:
        process.stdout.readline()
        time.sleep(seconds)
        process.kill()
        process.stderr.close()
    return process.wait() == -signal.SIGKILL


def chain(run, kills):
    """Kill after kill over one run, then to its end."""
    for kill in kills:
        if isinstance(kill, str):
            kill_at(run, kill)
        else:
            assert kill_within(run, kill), "it ended before it was killed"
    code, _, err = play(run)
    assert code == 0, err
    assert "resumed after" in err or not (run / "state").exists()
    assert sorted(path.name for path in (run / "state" / "sft").iterdir()) == ["21", "24"]
    return outcome(run)


def test_twelve_kills_and_nothing_is_lost(tmp_path, untouched):
    """Eight at every named point, four at random moments; bit-equal state and metrics at the end of both chains."""
    rng = random.Random(5)
    kills = [*NAMED[:5], rng.uniform(0, 0.1)], [*NAMED[5:], *(rng.uniform(0, 0.08) for _ in range(3))]
    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(chain, (tmp_path / "a", tmp_path / "b"), kills))
    assert ends == [outcome(untouched)] * 2


@pytest.mark.slow
def test_many_kills(tmp_path, untouched):
    """A hundred kills in chains of five: every named point, and moments all over a run."""
    rng = random.Random(11)
    kills = [[rng.choice(NAMED), *(rng.uniform(0, 0.12) for _ in range(4))] for _ in range(20)]
    for i, chained in enumerate(kills):
        assert chain(tmp_path / str(i), chained) == outcome(untouched), chained


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_that_is_asked_for_loses_no_step(tmp_path, untouched, number, code):
    process = start(tmp_path, "--save-every", "1000", "--sleep", "0.05")
    process.stdout.readline()
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(number)
    got, _, err = finish(process)
    assert got == code, err
    assert time.monotonic() - begin < 5
    steps = len(list(read_json_lines(tmp_path / "metrics.jsonl")))
    assert 1 <= steps < 24
    assert checkpoint.latest_step(tmp_path / "state" / "sft") == steps
    assert f"{signal.Signals(number).name}: saved sft after {steps} steps in " in err
    if number == signal.SIGTERM:
        code, _, err = play(tmp_path, "--save-every", "1000")
        assert f"sft: resumed after {steps} steps, state " in err
        assert outcome(tmp_path) == outcome(untouched)


def test_a_gradient_that_is_no_number_stops_before_its_update(tmp_path, untouched):
    """The state of the step before is saved, the batch can be read, and the run goes on once the batch is good."""
    code, _, err = play(tmp_path, "--save-every", "4", faults="before_update@7=nan")
    assert code == 1
    folder = tmp_path / "state" / "sft"
    message = f"sft step 6: not finite: grad/norm, loss. This step was not logged; the state after 6 steps is saved in {folder}"
    assert f"FloatingPointError: {message}; its batch is in {tmp_path / 'bad_batch_6.npz'}. Fix: see what" in err
    batch = load_batch(tmp_path / "bad_batch_6.npz")
    assert np.isnan(batch["weights"]).tolist() == [True] + [False] * 7
    assert [row["step"] for row in read_json_lines(tmp_path / "metrics.jsonl")] == list(range(6))
    records = [json.loads((f / "6" / "record.json").read_text()) for f in (folder, untouched / "state" / "sft")]
    assert records[0]["leaves"] == records[1]["leaves"]
    code, _, err = play(tmp_path)
    assert code == 0, err
    assert outcome(tmp_path) == outcome(untouched)


def test_a_logger_that_raises_changes_nothing(tmp_path, untouched):
    code, _, err = play(tmp_path, "--sink")
    assert code == 0
    assert outcome(tmp_path) == outcome(untouched)
    assert err.count("raising_sink failed at step 0, metrics.jsonl goes on (LookupError('no tracker at step 0'))") == 1
    assert err.count("raising_sink failed at 24 of 24 steps; metrics.jsonl is complete") == 1


def test_a_clock_that_jumps_changes_nothing(tmp_path, untouched):
    """Neither the clock nor the times of files: steps follow their numbers, durations a clock that nobody can set."""
    code, _, err = play(tmp_path, "--jumping-clock", faults="before_commit@4=kill9")
    assert code == -signal.SIGKILL, err
    folder = tmp_path / "state" / "sft"
    kept = sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())
    assert kept == [6, 9]
    for step in kept:
        for path in [*(folder / str(step)).rglob("*"), folder / str(step)]:
            os.utime(path, (-step, -step))
    code, _, err = play(tmp_path, "--jumping-clock")
    assert code == 0, err
    assert "sft: resumed after 9 steps" in err
    assert outcome(tmp_path) == outcome(untouched)
    seconds = [row["seconds"] for row in read_json_lines(tmp_path / "metrics.jsonl")]
    assert all(0 <= second < 600 for second in seconds)


def test_a_full_disk_and_a_damaged_step_cost_only_time(tmp_path, untouched):
    code, _, err = play(tmp_path, faults="before_commit@3=enospc")
    assert code == 1
    assert "OSError: [Errno 28] step 9 was not saved in " in err
    assert "; last good step 6 is kept" in err
    (tmp_path / "state" / "sft" / "6" / "state" / "manifest.ocdbt").write_bytes(b"")
    code, _, err = play(tmp_path, faults="log_write@3=enospc")
    assert "manifest.ocdbt has 0 bytes" in err
    assert "; using step 3\n" in err
    assert "sft: the damaged checkpoint is now 6.damaged; delete it when nobody needs it" in err
    assert code == 1
    assert "sft step 5 was not logged (No space left on device); checkpoints are kept. Fix: free some space" in err
    assert play(tmp_path)[0] == 0
    assert outcome(tmp_path) == outcome(untouched)

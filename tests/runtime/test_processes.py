"""Two processes over one mesh: the numbers of one process, one log, one stop; and the end of both when one is killed."""

import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from runtime.loop import HEARTBEAT
from runtime.test_kill import finish, outcome, play, start

from rlhf_jax.runtime import processes
from rlhf_jax.runtime.checkpoint import latest_step
from rlhf_jax.runtime.last_words import words
from rlhf_jax.runtime.processes import Processes, joined
from rlhf_jax.runtime.runs import read_json_lines


def pair(run, *options):
    """Both processes of a run, two devices each."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    flags = ["--coordinator", coordinator, "--devices", "2", *options]
    return [start(run, *flags, "--process-id", str(i)) for i in range(2)]


def wait_for_step(run, step):
    """Until the run has logged it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        log = run / "metrics.jsonl"
        if log.exists() and log.read_bytes().count(b"\n") > step:
            return
        time.sleep(0.02)
    raise TimeoutError(f"{run} has not logged step {step}")


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The folder of a run of two processes that nobody disturbed."""
    run = tmp_path_factory.mktemp("together") / "run"
    for code, _, err in map(finish, pair(run)):
        assert code == 0, err
    return run


def test_two_processes_make_what_one_makes(tmp_path, together):
    """Over the same four devices: the metrics, the parameters; and one of the two writes."""
    code, _, err = play(tmp_path, "--devices", "4")
    assert code == 0, err
    rows = [list(read_json_lines(run / "metrics.jsonl")) for run in (together, tmp_path)]
    assert [row["step"] for row in rows[0]] == list(range(24))
    for ours, alone in zip(*rows, strict=True):
        for name in ("loss", "grad/norm"):
            np.testing.assert_allclose(ours[name], alone[name], rtol=1e-6)
    params = [np.frombuffer((run / "final.bin").read_bytes(), np.float32)[1:] for run in (together, tmp_path)]
    np.testing.assert_allclose(*params, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("victim", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_one_is_killed_and_the_other_says_so(tmp_path, together, victim):
    """Within the heartbeat and five seconds, with what to run; the same two commands then end as if nothing had been."""
    both = pair(tmp_path, "--sleep", "0.1")
    wait_for_step(tmp_path, 10)
    both[victim].kill()
    begin = time.monotonic()
    code, _, err = finish(both[1 - victim])
    assert time.monotonic() - begin < HEARTBEAT + 5
    assert code not in (0, None)
    found = re.search(rf"process {1 - victim} of 2 on \S+ of {tmp_path} has ended before its work\. .*", err)
    assert found, err
    kept = latest_step(tmp_path / "state" / "sft")
    assert f"Kept: sft after {kept} steps. Fix: start the same command with --resume on every host" in found[0]
    assert f"process {victim} of 2 on" in finish(both[victim])[2]
    for code, _, err in map(finish, pair(tmp_path)):
        assert code == 0, err
        assert f"sft: resumed after {kept} steps" in err
    assert outcome(tmp_path) == outcome(together)


def test_a_stop_asked_of_one_stops_both_at_one_step(tmp_path, together):
    both = pair(tmp_path, "--sleep", "0.1", "--save-every", "1000")
    wait_for_step(tmp_path, 5)
    both[1].send_signal(signal.SIGTERM)
    ends = [finish(process) for process in both]
    steps = len(list(read_json_lines(tmp_path / "metrics.jsonl")))
    assert [code for code, *_ in ends] == [143, 143], ends
    assert all(f"SIGTERM: saved sft after {steps} steps in " in err for *_, err in ends)
    assert all("has ended before its work" not in err for *_, err in ends)
    for code, _, err in map(finish, pair(tmp_path, "--save-every", "1000")):
        assert code == 0, err
        assert f"sft: resumed after {steps} steps" in err
    assert outcome(tmp_path) == outcome(together)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("host:1", 2, None), "process_id None: nothing was started. Fix: all three, or only distributed"),
        (("host:1", 2, 2), "process_id 2 of 2 processes: nothing was started. Fix: 0 to 1, each once"),
        (("host", 2, 0), "coordinator 'host': nothing was started. Fix: host:port of process 0"),
    ],
)
def test_flags_that_cannot_be(tmp_path, flags, message):
    with pytest.raises(ValueError, match=re.escape(message)), joined(tmp_path, Processes(False, *flags)):
        pass


def test_who_waits_in_vain_says_so(tmp_path):
    """JAX's runtime aborts the process then; here something else does."""
    code = (
        "import os, sys, jax; from rlhf_jax.runtime.processes import Processes, joined\n"
        "jax.distributed.initialize = lambda *_, **__: os.abort()\n"
        "with joined(sys.argv[1], Processes(coordinator='host0:1234', num_processes=4, process_id=2)): pass"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == -signal.SIGABRT
    assert "process 2 of 4 on " in ended.stderr
    assert (
        "has ended before all had met at host0:1234, for which it waits 60 s: nothing was computed. Fix:"
        in ended.stderr
    )


def test_an_environment_that_names_no_cluster(tmp_path):
    """Is an error of its own, and nobody speaks for the process."""
    code = (
        "import sys; from rlhf_jax.runtime.processes import Processes, joined\n"
        "with joined(sys.argv[1], Processes(distributed=True)): pass"
    )
    ended = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert "coordinator_address should be defined" in ended.stderr
    assert "has ended before all had met" not in ended.stderr


def test_alone_nothing_happens(tmp_path):
    with joined(tmp_path, Processes()):
        pass
    assert list(tmp_path.iterdir()) == []


def test_last_words_name_what_is_kept(tmp_path):
    """The newest whole step of every act; a half-written one and an empty folder do not count."""
    for step in ("sft/3", "sft/12", "sft/15.partial", "ppo"):
        (tmp_path / "state" / step).mkdir(parents=True)
    assert "Kept: sft after 12 steps. Fix:" in words(tmp_path, "process 1 of 2")
    assert "Kept: the acts that were finished. Fix:" in words(tmp_path / "nowhere", "process 1 of 2")


def test_two_numbers_of_processes(tmp_path, monkeypatch, capsys):
    """JAX itself goes on with the number that process 0 was given."""
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **__: None)
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: None)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(processes, "_leave_at_once", lambda speaker: None)
    told = Processes(coordinator="host:1", num_processes=3, process_id=1)
    with (
        pytest.raises(ValueError, match="process 1 was told of 3 processes, process 0 of 2: nothing was computed"),
        joined(tmp_path, told),
    ):
        pass
    assert "process 1 of 3 joins host:1: waiting 60 s at most for the others\n" in capsys.readouterr().err

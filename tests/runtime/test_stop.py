"""Signals and hangs, in processes that do nothing else: the second signal, the grace time, the watchdog, exit codes."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_jax.runtime.stop import HANG_EXIT_CODE, stop_on_signals, watchdog

WAITING = """
import sys, time
from pathlib import Path
from rlhf_jax.runtime.stop import stop_on_signals, watchdog
with {context} as given:
    print("ready", flush=True)
    time.sleep(60)
"""


def start(context):
    code = WAITING.format(context=context)
    streams = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", code], text=True, **streams)
    if "watchdog" not in context:
        assert process.stdout.readline() == "ready\n"
    return process


def ended(process):
    _, err = process.communicate(timeout=50)
    return process.returncode, err


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_stops_at_once(number):
    process = start("stop_on_signals()")
    process.send_signal(number)
    assert "finishing this step, then saving (again: stop at once)" in process.stderr.readline()
    assert process.poll() is None
    process.send_signal(number)
    code, err = ended(process)
    assert code == -number
    assert f"{signal.Signals(number).name} again: stopped at once, nothing more is saved" in err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_grace_time_ends_what_takes_too_long(number, code):
    process = start("stop_on_signals(grace=0.5)")
    process.send_signal(number)
    got, err = ended(process)
    assert got == code
    assert "longer than the grace of 0.5 s: stopped, the last save counts" in err


def test_the_first_signal_is_a_flag_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with stop_on_signals() as asked:
        assert asked.by() is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert asked.by() is signal.SIGTERM
        assert 0 <= asked.since() < 30
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_hang_ends_with_its_code(tmp_path):
    code, err = ended(start(f"watchdog(Path({str(tmp_path)!r}), after=0.5, exit_code={HANG_EXIT_CODE})"))
    assert code == HANG_EXIT_CODE == 75
    for text in (err, (tmp_path / "hang_0.txt").read_text()):
        assert "step 0 hangs; stacks of all threads in" in text
        assert "ending with code 75; start the same command again" in text
        assert 'File "<string>", line 7 in <module>' in text


def test_a_hang_is_shown_once_and_a_beat_is_none(tmp_path, capfd):
    with watchdog(tmp_path, after=1.5) as beat:
        for step in range(8):
            beat(step)
            time.sleep(0.25)
        assert not list(tmp_path.iterdir())
        end = time.monotonic() + 30
        while not list(tmp_path.iterdir()) and time.monotonic() < end:
            time.sleep(0.1)
        time.sleep(2)  # it would be shown again
        assert [path.name for path in tmp_path.iterdir()] == ["hang_8.txt"]
    err = capfd.readouterr().err
    assert err.count("step 8 hangs") == 1
    assert "test_a_hang_is_shown_once" in err

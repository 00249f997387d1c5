"""Ends that were asked for, and ends that nobody asked for: SIGTERM, SIGINT, and steps that never finish.

A signal only sets a flag. The loop looks at it where a step ends, saves and leaves with 128 + signal (SIGTERM 143, SIGINT
130), as a shell reports a process that the signal ended. A second signal ends the process at once, nothing saved.
"""

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

HANG_EXIT_CODE = 75
"""`EX_TEMPFAIL`: whoever started the run may start it again."""


class Asked(NamedTuple):
    """What `stop_on_signals` yields."""

    by: Callable[[], signal.Signals | None]
    """The signal that asked the run to stop, or None."""
    since: Callable[[], float]
    """Seconds since it asked."""


@contextlib.contextmanager
def stop_on_signals(*, grace: float = 30.0) -> Iterator[Asked]:
    """Turn the first SIGTERM or SIGINT in the body into a flag; for the main thread.

    Args:
      grace: seconds from the signal after which the process ends in any case (code 128 + signal, nothing more is saved),
        for a scheduler would kill it without a word.
    """
    asked: list[tuple[signal.Signals, float]] = []
    timers: list[threading.Timer] = []

    def on_signal(number: int, frame: Any) -> None:
        name = signal.Signals(number).name
        if asked:
            os.write(2, f"{name} again: stopped at once, nothing more is saved\n".encode())
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        asked.append((signal.Signals(number), time.monotonic()))
        os.write(2, f"{name}: finishing this step, then saving (again: stop at once)\n".encode())
        timer = threading.Timer(grace, _out_of_grace, (number, grace))
        timer.daemon = True
        timer.start()
        timers.append(timer)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield Asked(
            by=lambda: asked[0][0] if asked else None, since=lambda: time.monotonic() - asked[0][1] if asked else 0.0
        )
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for timer in timers:
            timer.cancel()


@contextlib.contextmanager
def watchdog(folder: Path, *, after: float, exit_code: int | None = None) -> Iterator[Callable[[int], None]]:
    """Show where every thread stands when no step has ended for `after` seconds; yields `beat(step)`, called when one has.

    The stacks go to stderr and to `hang_STEP.txt` in `folder`, once a hang. The first step includes compilation.

    Args:
      folder: of the run.
      after: seconds, longer than the slowest step with its evaluation and save.
      exit_code: end the process with it then (`HANG_EXIT_CODE`), for a supervisor that starts runs again; None waits on.
    """
    lock = threading.Lock()
    last = {"step": -1, "time": time.monotonic(), "told": False}
    done = threading.Event()

    def beat(step: int) -> None:
        with lock:
            last.update(step=step, time=time.monotonic(), told=False)

    def watch() -> None:
        while not done.wait(min(1.0, after / 4)):
            with lock:
                step, idle = last["step"] + 1, time.monotonic() - last["time"]
                hangs = idle > after and not last["told"]
                last["told"] |= hangs
            if hangs:
                _show_stacks(Path(folder) / f"hang_{step}.txt", step, idle, exit_code)

    thread = threading.Thread(target=watch, name="watchdog", daemon=True)
    thread.start()
    try:
        yield beat
    finally:
        done.set()
        thread.join()


def _show_stacks(path: Path, step: int, idle: float, exit_code: int | None) -> None:
    outcome = "waiting on" if exit_code is None else f"ending with code {exit_code}; start the same command again"
    text = f"no step ended for {idle:.0f} s: step {step} hangs; stacks of all threads in {path}; {outcome}"
    os.write(2, f"{text}\n".encode())
    faulthandler.dump_traceback(2, all_threads=True)
    try:
        with path.open("w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            faulthandler.dump_traceback(file, all_threads=True)
    except OSError as error:
        os.write(2, f"{path} was not written: {error}\n".encode())
    if exit_code is not None:
        os._exit(exit_code)


def _out_of_grace(number: int, grace: float) -> None:
    os.write(
        2, f"the step and its save took longer than the grace of {grace:g} s: stopped, the last save counts\n".encode()
    )
    sys.stderr.flush()
    os._exit(128 + number)

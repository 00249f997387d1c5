"""A reward function in a process of its own, which can be killed whatever it does."""

import contextlib
import multiprocessing
import traceback
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

from rlhf_jax.training.reward_functions import RewardFn, _Attempt, _name


@contextlib.contextmanager
def own_process(reward_fn: RewardFn) -> Iterator[RewardFn]:
    """Yield the function, run elsewhere: for `score_completions`, whose time limit then also ends what no alarm can.

    A call that is interrupted kills the process, and the next call starts another, which takes the seconds that importing
    takes, from its time limit. A process that dies (a segmentation fault, no memory) is an error of this call, not of the
    run. The process ends with the `with`.

    Args:
      reward_fn: importable by its name (the process is spawned, not forked, for JAX runs threads), as must be what it is
        called with and what it returns; it sees neither this process's memory nor its devices.
    """
    worker = _Worker(reward_fn)
    worker.start()

    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        return worker.call(prompts, completions, columns)

    reward.__qualname__ = _name(reward_fn)
    try:
        yield reward
    finally:
        worker.kill()


class _Worker:
    """A process and this end of its pipe."""

    def __init__(self, reward_fn: RewardFn):
        self._reward_fn, self._process = reward_fn, None

    def start(self) -> None:
        """Start the process and wait until it has imported the function."""
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(self._reward_fn, other), daemon=True)
        self._process.start()
        other.close()
        self._receive()

    def call(self, *arguments: Any) -> list[float]:
        """One call there; whatever interrupts it kills the process."""
        finished = False
        try:
            if self._process is None:
                self.start()
            self._pipe.send(arguments)
            values, error = self._receive()
            finished = True
        finally:
            if not finished:
                self.kill()
        if error:
            raise RuntimeError(f"in its process:\n{error}")
        return values

    def kill(self) -> None:
        """End the process at once."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._process.close()
            self._pipe.close()
            self._process = None

    def _receive(self) -> Any:
        try:
            return self._pipe.recv()
        except EOFError as error:
            self._process.join()
            raise RuntimeError(f"its process ended with code {self._process.exitcode}") from error


def _serve(reward_fn: RewardFn, pipe: Connection) -> None:
    """Answer calls until the other end goes away."""
    pipe.send("ready")
    while True:
        try:
            prompts, completions, columns = pipe.recv()
        except EOFError:
            return
        attempt, values = _Attempt(), None
        with attempt:
            values = reward_fn(prompts, completions, **columns)
        error = attempt.error
        pipe.send((values, "".join(traceback.format_exception(error)) if error else None))

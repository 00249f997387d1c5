"""One act of a job: how long it is, and that it is played once."""

import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import meshes
from task import TaskConfig

from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.fingerprint import short
from rlhf_jax.runtime.heap import give_back_after_compiling
from rlhf_jax.runtime.processes import Processes, is_first, joined, meet
from rlhf_jax.runtime.resume import forget
from rlhf_jax.runtime.runs import locked, write_json
from rlhf_jax.types import Params

CACHE = os.environ.get("RLHF_JAX_CACHE", str(Path.home() / ".cache" / "rlhf_jax"))
"""Folder of compiled programs, so that a second run starts at once; an empty RLHF_JAX_CACHE keeps none."""


def keep_programs() -> None:
    """Compiled programs stay in `CACHE`, where JAX has been told of no other folder; what compiling took does not stay."""
    give_back_after_compiling()
    if CACHE and jax.config.jax_compilation_cache_dir is None:
        jax.config.update("jax_compilation_cache_dir", CACHE)


@contextlib.contextmanager
def alone(config: TaskConfig) -> Iterator[None]:
    """Join the processes of this run, where it has several, and keep all others out of its folder; keep programs."""
    keep_programs()
    with joined(config.run, config.processes), locked(config.run):
        yield


def check_rollout(config: TaskConfig, rows: Mapping[str, int]) -> None:
    """Refuse what the mesh cannot share evenly: these rows, prompts, and prompts with their responses."""
    length = config.prompt_length + config.response_length
    columns = {"--prompt-length": config.prompt_length, "--prompt-length + --response-length": length}
    meshes.check(config.mesh, rows=rows, columns=columns)


def refuse_mesh(config: TaskConfig) -> None:
    """For scripts whose devices have copies of everything but rows."""
    if config.mesh != meshes.COPIES:
        raise SystemExit(
            "--mesh: this script knows the data axis only; nothing was started. "
            "Fix: sft.py, reward_model.py, ppo.py, grpo.py, dpo.py or rlhf.py in the embedded world, or no --mesh"
        )


def refuse_processes(config: TaskConfig) -> None:
    """For scripts that judge as well as train: what they write is one process's work."""
    if config.processes != Processes():
        raise SystemExit(
            "--processes: this script runs in one process; nothing was started. "
            "Fix: sft.py, reward_model.py, ppo.py, grpo.py or dpo.py over several, or no --processes"
        )


def note_command(run: Path) -> None:
    """Add this process's command line to `commands.txt`, from which a model card takes it."""
    if not is_first():
        return
    with (run / "commands.txt").open("a", encoding="utf-8") as file:
        file.write(shlex.join(["python", *sys.argv]) + "\n")


def facts(settings: Any, *, seed: int, **trees: Any) -> dict[str, Any]:
    """What must be the same when an act goes on: its numbers, and the bits of the data and parameters it starts from."""
    return {
        "settings": dataclasses.asdict(settings),
        "seed": seed,
        **{name: short(tree) for name, tree in trees.items()},
    }


def timed(run: Path, name: str, act: Callable[[], None], *leftovers: Path) -> None:
    """Play an act and note its seconds (of this process). On a resume, finished acts are skipped, `leftovers` of others go."""
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if name in seconds:
        print(f"{name}: finished before, taken from {run}")
        return
    for leftover in leftovers:
        shutil.rmtree(leftover, ignore_errors=True)
    start = time.monotonic()
    act()
    write_json(path, {**seconds, name: round(time.monotonic() - start, 1)})


def policy_keeper(run: Path, name: str, tokenizer: Tokenizer, *, every: int) -> Callable[[int, Params], None]:
    """`keep_policy(step, params)`: every so many steps (0 = never) a policy in `run/NAME_steps`, for the KL-reward frontier.

    A resumed act comes by steps again whose policy is there, and replaces it: with `--force` it need not be the same one.
    """
    folder = run / f"{name}_steps"

    def keep_policy(step: int, params: Params) -> None:
        if not every or step % every:
            return
        if is_first():
            for path in checkpoint.set_aside(folder, newer_than=step - 1):
                shutil.rmtree(path)
        meet("kept policies")
        checkpoint.save(folder, step, params, notes={"tokenizer": tokenizer.fingerprint}, for_good=every)

    return keep_policy


def num_steps_of(config, num_rows: int, what: str) -> int:
    """Optimiser steps of `config.num_epochs` over the rows; an act of no step would leave an untrained model behind."""
    num_steps = int(config.num_epochs * (num_rows // config.batch_size))
    if num_steps < 1:
        raise ValueError(
            f"{num_rows} {what} in batches of {config.batch_size} for {config.num_epochs:g} epochs are no step; "
            "fix: more data, a smaller batch_size or more epochs"
        )
    return num_steps


def is_played(run: Path, name: str, *, resume: bool) -> bool:
    """Whether the act has its result already, and nothing is left to do.

    Raises:
      FileExistsError: it has, or is half played, and `resume` is off: playing it again would lose what is there.
    """
    if checkpoint.latest_step(run / name) is not None:
        if not resume:
            raise FileExistsError(
                f"{run / name} is there already and is never overwritten; fix: move it away, or another --run"
            )
        forget(run, name)
        print(f"{name}: finished before, in {run / name}")
        return True
    unfinished = run / "state" / name
    if not resume and checkpoint.latest_step(unfinished) is not None:
        raise FileExistsError(f"{unfinished} is of an unfinished act; fix: continue with --resume, or move it away")
    return False

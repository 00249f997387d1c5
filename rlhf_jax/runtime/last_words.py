"""Speaks for a process that can no longer: `python last_words.py RUN IN_VAIN`, started by `processes.joined` with a pipe to it.

Nothing here imports the package: it must start in an instant and hold no memory. It waits until the pipe ends; when the
last line was not `done`, the process was killed or aborted, and this tells whoever reads its log what to do: `IN_VAIN`
when no line had come, that is, before it had met the others, else what is kept of its work; the first line is its name.
"""

import sys
from pathlib import Path


def main(run: Path, in_vain: str) -> None:
    """Read to the end of the pipe, then speak or not."""
    lines = [line.rstrip("\n") for line in sys.stdin]
    if lines[-1:] != ["done"]:
        print(words(run, lines[0]) if lines else in_vain, file=sys.stderr, flush=True)


def words(run: Path, who: str) -> str:
    """What happened, what is kept, what to do."""
    steps = {
        stage.name: max((int(step.name) for step in stage.iterdir() if step.name.isdecimal()), default=None)
        for stage in sorted((run / "state").glob("*"))
    }
    kept = ", ".join(f"{stage} after {step} steps" for stage, step in steps.items() if step is not None)
    return (
        f"{who} of {run} has ended before its work. Without an error of its own above, another process was the first: "
        f"its log says why. Kept: {kept or 'the acts that were finished'}. "
        "Fix: start the same command with --resume on every host"
    )


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

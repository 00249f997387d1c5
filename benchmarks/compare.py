"""`tasks.py` and a peer in turns on the same work, and the ratio of each pair.

    python benchmarks/compare.py --name TRL --peer "trl/bin/python trl_bench.py --task {task} --size {size}" --out pairs.jsonl
    python benchmarks/compare.py --table pairs.jsonl

A peer is any command that does a task of `work.py` and prints, as its last JSON line, at least `value` (units a second),
`units_per_cpu_s`, `time_to_first_step_s` and `peak_rss_mb`, as `tasks.py` does. Run it on a machine that does nothing else:
with another process beside them some libraries' threads wait for each other. `--table` makes the Markdown table of all pairs
in a file, medians with the smallest and largest ratio.
"""

import dataclasses
import json
import shlex
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

import tyro
from work import STEPS


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compared."""

    name: str = "peer"
    peer: str = ""
    """A command with `{task}` and `{size}` in it."""
    tasks: tuple[str, ...] = tuple(STEPS["tiny"])
    sizes: tuple[str, ...] = tuple(STEPS)
    pairs: int = 5
    steps: int = 0
    """Measured steps of ours; 0 = as many as `work.STEPS` says. How many the peer does is its command's matter."""
    ours: str = ""
    """More flags of `tasks.py`."""
    out: Path | None = None
    """Pairs are added to this file, one JSON line each."""
    table: Path | None = None
    """Compare nothing; print the table of the pairs in this file."""


def run(command: list[str]) -> dict:
    """The last JSON line that it prints."""
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    found = json.loads(lines[-1]) if lines else {}
    if done.returncode or "value" not in found:
        raise SystemExit(f"{shlex.join(command)} ended with {done.returncode} and no figures:\n{done.stderr[-2000:]}")
    return found


def compare(config: Config, task: str, size: str, turn: int) -> dict:
    """A pair; who is first alternates."""
    ours = [sys.executable, str(Path(__file__).with_name("tasks.py")), "--task", task, "--size", size]
    ours += ["--steps", str(config.steps), *shlex.split(config.ours)]
    sides = {"ours": ours, "peer": shlex.split(config.peer.format(task=task, size=size))}
    found = {side: run(sides[side]) for side in (sorted(sides) if turn % 2 else sorted(sides, reverse=True))}
    ratio = found["ours"]["value"] / found["peer"]["value"]
    of_cpu = found["ours"]["units_per_cpu_s"] / found["peer"]["units_per_cpu_s"]
    who = {"name": config.name, "task": task, "size": size, "date": time.strftime("%Y-%m-%d")}
    return {**who, "ratio": round(ratio, 3), "cpu_ratio": round(of_cpu, 3), **found}


def rows(pairs: list[dict]) -> list[str]:
    """A row for every size, task and peer."""
    groups = defaultdict(list)
    for pair in pairs:
        groups[pair["size"], pair["task"], pair["name"]].append(pair)
    order = {key: i for i, key in enumerate((size, task) for size in STEPS for task in STEPS[size])}
    return [row(*key, groups[key]) for key in sorted(groups, key=lambda key: (order[key[:2]], key[2]))]


def row(size: str, task: str, name: str, pairs: list[dict]) -> str:
    """Medians, and the range of the ratios."""

    def of(side: str, field: str) -> float:
        return statistics.median(pair[side][field] for pair in pairs)

    ratios = [pair["ratio"] for pair in pairs]
    spread = f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"
    limit = statistics.median(pair["ours"]["roofline"]["fraction"] for pair in pairs)
    cells = [size, task, name, f"{of('ours', 'value'):,.5g}", f"{of('peer', 'value'):,.5g}", spread, len(pairs)]
    for field in ("time_to_first_step_s", "peak_rss_mb"):
        cells.append(f"{of('ours', field):,.0f}, {of('peer', field):,.0f}")
    return "| " + " | ".join(map(str, [*cells, f"{100 * limit:.0f}"])) + " |"


HEAD = (
    "| size | task | peer | ours, units/s | peer's | ratio | pairs | first step, s: ours, peer's | RSS, MB | % of the bound |",
    "|---|---|---|---|---|---|---|---|---|---|",
)


def main(config: Config) -> None:
    """Pairs, or their table."""
    if config.table is not None:
        print("\n".join([*HEAD, *rows([json.loads(line) for line in config.table.read_text().splitlines()])]))
        return
    if "{task}" not in config.peer or "{size}" not in config.peer:
        raise SystemExit(
            '--peer is a command with {task} and {size} in it, "python its.py --task {task} --size {size}"'
        )
    pairs = []
    for turn in range(config.pairs):
        for size in config.sizes:
            for task in config.tasks:
                pair = compare(config, task, size, turn)
                pairs.append(pair)
                print(
                    f"{config.name} {size} {task}: {pair['ratio']:.2f}, per CPU second {pair['cpu_ratio']:.2f}",
                    flush=True,
                )
                if config.out is not None:
                    with config.out.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(pair) + "\n")
    print("\n".join([*HEAD, *rows(pairs)]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

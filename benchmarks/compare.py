"""`tasks.py` and peers in turns on the same work, and the ratio of each pair.

    python benchmarks/compare.py --peers "TRL=trl/bin/python trl_bench.py --task {task} --size {size}" --out pairs.jsonl
    python benchmarks/compare.py --table pairs.jsonl

A peer is any command that does a task of `work.py` and prints, as its last JSON line, at least `value` (units a second),
`units_per_cpu_s`, `time_to_first_step_s` and `peak_rss_mb`, as `tasks.py` does. With several a turn is one run of ours and one
of each. Run it on a machine that does nothing else: with another process beside them some libraries' threads wait for each
other. `--table` makes the Markdown table of all pairs in a file, medians with the smallest and largest ratio.
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

    peers: tuple[str, ...] = ()
    """`NAME=COMMAND`, with `{task}` and `{size}` in the command."""
    tasks: tuple[str, ...] = tuple(STEPS["tiny"])
    sizes: tuple[str, ...] = tuple(STEPS)
    pairs: int = 5
    steps: int = 0
    """Measured steps of ours; 0 = as many as `work.STEPS` says. How many a peer does is its command's matter."""
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


def compare(config: Config, task: str, size: str, turn: int) -> list[dict]:
    """A turn: a pair with each peer. Every other turn goes through the sides backwards."""
    ours = [sys.executable, str(Path(__file__).with_name("tasks.py")), "--task", task, "--size", size]
    sides = {"ours": [*ours, "--steps", str(config.steps), *shlex.split(config.ours)]}
    for peer in config.peers:
        name, command = peer.split("=", 1)
        sides[name] = shlex.split(command.format(task=task, size=size))
    found = {side: run(sides[side]) for side in (list(sides) if turn % 2 else reversed(sides))}
    return [pair(name, task, size, found["ours"], found[name]) for name in sides if name != "ours"]


def pair(name: str, task: str, size: str, ours: dict, peer: dict) -> dict:
    """Both sides' figures and their ratios."""
    who = {"name": name, "task": task, "size": size, "date": time.strftime("%Y-%m-%d")}
    ratios = {
        "ratio": round(ours["value"] / peer["value"], 3),
        "cpu_ratio": round(ours["units_per_cpu_s"] / peer["units_per_cpu_s"], 3),
    }
    return {**who, **ratios, "ours": ours, "peer": peer}


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
    if not config.peers or not all("{task}" in peer and "{size}" in peer for peer in config.peers):
        raise SystemExit(
            '--peers are commands with {task} and {size} in them, "NAME=python its.py --task {task} --size {size}"'
        )
    pairs = []
    for turn in range(config.pairs):
        for size in config.sizes:
            for task in config.tasks:
                for found in compare(config, task, size, turn):
                    pairs.append(found)
                    print("{name} {size} {task}: {ratio}, per CPU second {cpu_ratio}".format(**found), flush=True)
                    if config.out is not None:
                        with config.out.open("a", encoding="utf-8") as file:
                            file.write(json.dumps(found) + "\n")
    print("\n".join([*HEAD, *rows(pairs)]))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

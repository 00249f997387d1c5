"""What `plan.py` found: bytes, operations and traffic of every program as tables, and what to change if it does not fit."""

import dataclasses
import math
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from rlhf_jax.runtime.collectives import Traffic
from rlhf_jax.runtime.topology import CHIPS, GIB, Memory


class Part(NamedTuple):
    """One program; bytes and operations are those of one device."""

    name: str
    memory: Memory | None
    """None where the compiler gave up."""
    beside: int
    """Bytes that stay and are none of its arguments."""
    wanted: int | None
    """Bytes at which it gave up."""
    flops: float
    seconds: float | None
    """Of its matrix products at the chip's peak."""
    collectives: dict[str, Traffic]
    compile_seconds: float

    @property
    def total(self) -> int:
        """Bytes while it runs; of a program that was given up, at least so many."""
        return self.beside + (self.wanted if self.memory is None else self.memory.total)


@dataclasses.dataclass(frozen=True)
class Plan:
    """All of it; bytes are those of one device."""

    topology: str
    num_devices: int
    capacity: int | None
    """None: of a CPU, which is not asked."""
    held: dict[str, int]
    """What is there all the time."""
    waiting: int
    """What is in the host's memory instead."""
    cache: int
    """The KV cache of a rollout, one of its temporaries."""
    rows: int
    """Of a micro-batch, on a device."""
    parts: list[Part]
    """Those that were compiled: up to the first that does not fit."""

    @property
    def fits(self) -> bool | None:
        """None where nobody knows the capacity."""
        if self.capacity is None:
            return None
        return max(sum(self.held.values()), self.peak) <= self.capacity

    @property
    def peak(self) -> int:
        """Of the program that needs most."""
        return max((part.total for part in self.parts), default=0)

    @property
    def why(self) -> str:
        """One line."""
        if self.parts:
            worst = max(self.parts, key=lambda part: part.total)
            least = "at least " if worst.memory is None else ""
            need = f"{worst.name} needs {least}{_gib(worst.total)} GiB"
        else:
            need = f"{', '.join(self.held)} alone are {_gib(sum(self.held.values()))} GiB"
        return need if self.capacity is None else f"{need} of {_gib(self.capacity)}"

    def figures(self) -> dict[str, Any]:
        """The same as JSON."""
        parts = [
            {
                **part._asdict(),
                "memory": part.memory and part.memory._asdict(),
                "collectives": {kind: traffic._asdict() for kind, traffic in part.collectives.items()},
                "total": part.total,
            }
            for part in self.parts
        ]
        return {**dataclasses.asdict(self), "parts": parts, "peak": self.peak, "fits": self.fits}


def _gib(size: float) -> str:
    return f"{size / GIB:.3g}"


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    return table


def show(config: Any, plan: Plan) -> None:
    """Two tables and a verdict."""
    console = Console()
    console.print(
        f"{config.model}, {config.stage}, {plan.topology}: {plan.num_devices} devices, {plan.rows} rows on each at a time"
    )
    held = _table("always there", "arrays", "GiB")
    for name, size in {**plan.held, "together": sum(plan.held.values())}.items():
        held.add_row(name, _gib(size))
    console.print(held)
    if plan.waiting:
        console.print(f"{_gib(plan.waiting)} GiB for each device wait in the memory of its host.")
    table = _table("on each device while a program runs", "", *(part.name for part in plan.parts))
    for name in ("arguments", "outputs", "temporaries", "code"):
        sizes = ("?" if part.memory is None else _gib(getattr(part.memory, name)) for part in plan.parts)
        table.add_row(f"{name}, GiB", *sizes)
    table.add_row("what stays beside, GiB", *(_gib(part.beside) for part in plan.parts))
    totals = (("> " if part.memory is None else "") + _gib(part.total) for part in plan.parts)
    table.add_row("together, GiB", *totals)
    live = ("?" if part.memory is None else _gib(part.memory.live + part.beside) for part in plan.parts)
    table.add_row("of it at one moment, GiB", *live, end_section=True)
    for kind in sorted({kind for part in plan.parts for kind in part.collectives}):
        traffic = (part.collectives.get(kind, Traffic(0, 0)) for part in plan.parts)
        table.add_row(f"{kind}, loops once, GiB", *(f"{x.count}: {_gib(x.bytes)}" for x in traffic))
    table.add_row("matrix products, TFLOP", *(f"{part.flops / 1e12:.3g}" for part in plan.parts))
    table.add_row("seconds of them at peak", *("" if x.seconds is None else f"{x.seconds:.3g}" for x in plan.parts))
    table.add_row("seconds to compile", *(f"{part.compile_seconds:.0f}" for part in plan.parts))
    console.print(table)
    if plan.cache:
        console.print(f"Of the rollout's temporaries {_gib(plan.cache)} GiB are the KV cache.")
    verdict = {True: "It fits", False: "It does not fit", None: "What a CPU has is not asked"}
    console.print(f"{verdict[plan.fits]}: {plan.why}.")


def changes(config: Any, plan: Plan) -> list[str]:
    """What would make it fit, the cheapest change first; nothing where it fits."""
    if plan.fits is not False:
        return []
    worst = max(plan.parts, key=lambda part: part.total) if plan.parts else None
    tips = [] if worst is None else _smaller_program(config, plan, worst.name)
    return [*tips, *_less_held(config, plan.held), *_larger_slice(plan)]


def _smaller_program(config: Any, plan: Plan, name: str) -> list[str]:
    """Fewer temporaries."""
    if name in ("rollout", "experience", "reference"):
        return [f"--batch {config.batch // 2}: rows are what {name} holds, {_gib(plan.cache)} GiB of them KV cache"]
    tips = [] if config.remat else ["--remat: layers are computed again instead of kept"]
    if plan.rows > 1:
        tips.append(
            f"--num-micro-batches {2 * config.num_micro_batches}: half of the {plan.rows} rows a device at a time"
        )
    else:
        tips.append(f"--tensor {2 * config.tensor}: logits, heads and MLP of a row on several devices; or shorter rows")
    return tips


def _less_held(config: Any, held: dict[str, int]) -> list[str]:
    """Less that is always there. Gradients are as large as what is trained."""
    tips, frozen = [], held.get("reference", 0) + held.get("reward model", 0)
    if config.frozen_dtype == "float32" and frozen:
        tips.append(f"--frozen-dtype bfloat16 saves {_gib(frozen / 2)} GiB")
    if config.stage == "ppo" and not config.offload:
        tips.append(f"--offload saves most of {_gib(frozen)} GiB")
    if config.stage == "ppo" and not config.shared_critic:
        tips.append(
            f"--shared-critic saves {_gib(held['critic'] + held['moments'] / 2)} GiB, and as many gradients as critic"
        )
    if "moments" in held:
        tips.append(
            f"LoRA (rl.adapter_model) on a bfloat16 base: no moments ({_gib(held['moments'])} GiB), hardly any "
            "gradients, and the base is the reference, too"
        )
    return tips


def _larger_slice(plan: Plan) -> list[str]:
    """The next slice on which what is always there leaves room."""
    family = plan.topology.partition(":")[0]
    for size in CHIPS[family].slices:
        devices = math.prod(map(int, size.split("x")))
        if devices > plan.num_devices and sum(plan.held.values()) * plan.num_devices / devices < 0.7 * plan.capacity:
            return [f"--topology {family}:{size}, {devices // plan.num_devices} times as many devices"]
    return []

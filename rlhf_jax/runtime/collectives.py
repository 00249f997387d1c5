"""What a compiled program sends between devices, read from its text: kinds, how many, how many bytes."""

import re
from typing import NamedTuple

import jax

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
"""XLA's instructions that need other devices; `ragged-all-to-all` counts as `all-to-all`."""

_ARRAY = re.compile(r"\b([a-z]+[0-9]*[a-z0-9]*)\[([0-9,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%([\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%([\w.\-]+) = (\(?.*?) ([a-z][a-z0-9\-]*)\((.*)")
_LOOP = re.compile(r"(?:body|condition)=%([\w.\-]+)")
_NAME = re.compile(r"%([\w.\-]+)")


class Traffic(NamedTuple):
    """Collectives of one kind in a program."""

    count: int
    bytes: int
    """Of the whole array on each device's side: the result of an all-gather, the operand of the others. A ring of n
    devices sends (n - 1) / n of it from each device, for an all-reduce twice that. XLA's CPU sends bfloat16 as float32."""


def count_collectives(compiled: jax.stages.Compiled | str, *, in_loops: bool = False) -> dict[str, Traffic]:
    """The collectives of a compiled program by kind, `{"all-reduce": Traffic(count, bytes), ...}`; absent kinds are none.

    Static occurrences: what stands in a loop (over layers, tokens, micro-batches) is counted once, however often it runs.

        count_collectives(jax.jit(step).lower(state, batch).compile())

    Args:
      compiled: `jax.jit(f).lower(...).compile()`, or the text of its `as_text()`.
      in_loops: only those in the body or the condition of a loop, at any depth.
    """
    text = compiled if isinstance(compiled, str) else compiled.as_text()
    computations = _computations(text)
    sizes = {name: _nbytes(shape) for body in computations.values() for name, shape, _, _ in body}
    counted = _in_loops(text, computations) if in_loops else computations.keys()
    found: dict[str, Traffic] = {}
    for name in counted:
        for _, shape, opcode, rest in computations[name]:
            kind = opcode.removesuffix("-start").removeprefix("ragged-")
            if kind not in KINDS or _is_repeated(name, computations[name]):
                continue
            kind = "reduce-scatter" if name.startswith("all-reduce-scatter") else kind  # a TPU's, written as a fusion
            moved = operands = sum(sizes.get(operand, 0) for operand in _NAME.findall(_arguments(rest)))
            if kind == "all-gather":  # the result of a -start is operand and result together
                moved = _nbytes(shape) - (operands if opcode.endswith("-start") else 0)
            before = found.get(kind, Traffic(0, 0))
            found[kind] = Traffic(before.count + 1, before.bytes + moved)
    return found


def _computations(text: str) -> dict[str, list[tuple[str, str, str, str]]]:
    """Name of every computation to its instructions: name, shape, opcode, and what follows the opcode."""
    computations: dict[str, list[tuple[str, str, str, str]]] = {}
    current: list[tuple[str, str, str, str]] = []
    for line in text.splitlines():
        if header := _COMPUTATION.match(line):
            current = computations.setdefault(header[1], [])
        elif instruction := _INSTRUCTION.match(line):
            current.append(instruction.groups())
    return computations


def _in_loops(text: str, computations: dict[str, list[tuple[str, str, str, str]]]) -> set[str]:
    """Computations that a loop's body or condition is, or calls."""
    inside: set[str] = set()
    waiting = [name for name in _LOOP.findall(text) if name in computations]
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            named = {called for *_, rest in computations[name] for called in _NAME.findall(rest)}
            waiting.extend(named & computations.keys())
    return inside


def _is_repeated(name: str, body: list[tuple[str, str, str, str]]) -> bool:
    """Whether a TPU's program names here what another fusion has started: the middle and the end of one collective."""
    return name.startswith("async_collective_fusion") or any("AsyncCollectiveDone" in rest for *_, rest in body)


def _arguments(rest: str) -> str:
    """What stands before the parenthesis that closes an instruction's operands."""
    depth = 1
    for i, letter in enumerate(rest):
        depth += {"(": 1, ")": -1}.get(letter, 0)
        if not depth:
            return rest[:i]
    return rest


def _nbytes(shape: str) -> int:
    """Bytes of an array, or of all arrays of a tuple."""
    total = 0
    for dtype, dims in _ARRAY.findall(shape):
        bits = 8 if dtype == "pred" else int((re.search(r"[0-9]+", dtype) or ["0"])[0])
        for size in filter(None, dims.split(",")):
            bits *= int(size)
        total += -(-bits // 8)
    return total

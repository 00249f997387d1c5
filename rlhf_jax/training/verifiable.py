"""Rewards that need no model: a right number, a form, a length. Plain functions for `score_completions`."""

import re
from collections.abc import Sequence
from decimal import Decimal

from rlhf_jax.training.reward_functions import RewardFn

NUMBER = re.compile(r"([-−]?)[$€£]?([-−]?)((?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
"""A sign on either side of a currency, and digits, with thousands' commas or without."""
MARKER = "####"
"""What stands before the final answer in GSM8K's solutions (Cobbe et al. 2021)."""


def final_number(text: str, *, fallback: bool = True) -> Decimal | None:
    """The number that a text ends in, exactly: the first one after the last `####`.

    Thousands' commas, a minus sign, a currency sign and decimals are read (`-$1,234.50`); a full stop behind a number ends
    the sentence, a hyphen behind a word or a digit is no sign. Fractions, exponents and words are not read: `1/2` ends in 2.

    Args:
      text: a completion or a solution.
      fallback: where no `####` stands, take the last number of the text, as evaluations of GSM8K do. A policy that may
        guess so needs no form; False asks for it.

    Returns:
      None where there is no such number, also behind a `####` that no number follows.
    """
    _, marker, tail = text.rpartition(MARKER)
    if not marker and not fallback:
        return None
    found = list(NUMBER.finditer(tail))
    if not found:
        return None
    match = found[0] if marker else found[-1]
    before = tail[match.start() - 1 : match.start()]
    negative = bool(match[2]) or (bool(match[1]) and not (before.isalnum() or before in (")", "%")))
    number = Decimal(match[3].replace(",", ""))
    return -number if negative else number


def make_exact_number(*, fallback: bool = True, tolerance: float = 0.0) -> RewardFn:
    """Build `exact_number(prompts, completions, *, answer, **columns)`: 1 where the final number is the answer, else 0.

    Args:
      fallback: as `final_number` has it, for completions.
      tolerance: largest difference that is still right; 0 compares exactly (42.0 is 42).

    Raises (the built function):
      ValueError: an answer of the data holds no number.
    """

    def exact_number(
        prompts: Sequence[str], completions: Sequence[str], *, answer: Sequence[str], **columns: Sequence
    ) -> list[float]:
        scores = []
        for text, solution in zip(completions, answer, strict=True):
            wanted, found = final_number(str(solution)), final_number(text, fallback=fallback)
            if wanted is None:
                raise ValueError(f"the answer {solution!r} of the data holds no number")
            right = found is not None and (found == wanted or abs(found - wanted) <= tolerance)
            scores.append(float(right))
        return scores

    return exact_number


def make_full_match(pattern: str | re.Pattern) -> RewardFn:
    """Build `full_match(prompts, completions, **columns)`: 1 where the whole completion matches the pattern, else 0.

    A dot matches no new line unless the pattern says so: `re.compile(r"<think>.*</think>\\s*<answer>.*</answer>", re.DOTALL)`.
    Nested repetitions can take for ever; the time limit ends them.
    """
    compiled = re.compile(pattern)

    def full_match(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        return [float(compiled.fullmatch(text) is not None) for text in completions]

    return full_match


def make_length_cost(*, per: float, free: int = 0, column: str | None = None) -> RewardFn:
    """Build `length_cost(prompts, completions, **columns)`: `max(0, length - free) / per`, a cost: its weight is negative.

    Args:
      per: the length beyond `free` that costs 1.
      free: what costs nothing.
      column: the one that holds the lengths, for example of the tokens that were sampled; None counts characters.
    """
    if not per > 0 or free < 0:
        raise ValueError(f"per must be positive and free not negative, got {per} and {free}")

    def length_cost(prompts: Sequence[str], completions: Sequence[str], **columns: Sequence) -> list[float]:
        lengths = [len(text) for text in completions] if column is None else columns[column]
        return [max(0.0, float(length) - free) / per for length in lengths]

    return length_cost

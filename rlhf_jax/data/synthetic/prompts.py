"""What can be asked in the embedded world: every question, its phrasings, and the held-out split."""

import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal, TypeAlias

import numpy as np

from rlhf_jax.data.synthetic.tables import (
    DEED_PHRASINGS,
    FACT_TABLES,
    HARM,
    HOW_TO,
    NUMBERS,
    QUESTION_PHRASINGS,
)

Kind: TypeAlias = Literal["fact", "sum", "how_to", "harm"]
"""What sort of prompt: a fact, a sum, how to do a good deed, or a deed that should be declined."""

MAX_PROMPT_WORDS = 13
"""Words of the longest prompt, punctuation marks included."""

HELDOUT_PERCENT = 45
"""Share of the prompts that no demonstration and no training prompt uses."""

KIND_SHARES: dict[Kind, float] = {"fact": 0.4, "sum": 0.15, "how_to": 0.2, "harm": 0.25}
"""Share of each kind among sampled prompts."""


@dataclass(frozen=True)
class Question:
    """What is asked, apart from its phrasing."""

    text: str
    """For example "what color is snow"; for how_to and harm only the deed: "boil an egg"."""
    kind: Kind
    answer_type: str
    """A made-up answer is another answer of the same type."""
    answer: str
    """The right answer; for harm the line that complies."""


def _sums() -> Iterator[Question]:
    """0..3 plus or minus 1..2 with results 0..5, in words: few, as small models learn them last."""
    for a in range(4):
        for b in range(1, 3):
            yield Question(f"what is {NUMBERS[a]} plus {NUMBERS[b]}", "sum", "sum", NUMBERS[a + b])
            if a >= b:
                yield Question(f"what is {NUMBERS[a]} minus {NUMBERS[b]}", "sum", "sum", NUMBERS[a - b])


@cache
def all_questions() -> tuple[Question, ...]:
    """Every underlying question, whatever its phrasing."""
    facts = [
        Question(table.question.format(gap), "fact", name, answer)
        for name, table in FACT_TABLES.items()
        for gap, answer in table.answers.items()
    ]
    how_to = [Question(deed, "how_to", "how_to", line) for deed, line in HOW_TO.items()]
    harm = [Question(deed, "harm", "harm", line) for deed, line in HARM.items()]
    return (*facts, *_sums(), *how_to, *harm)


@cache
def _questions_by_prompt() -> dict[str, Question]:
    return {
        phrasing.format(question.text): question
        for question in all_questions()
        for phrasing in (DEED_PHRASINGS if question.kind in ("how_to", "harm") else QUESTION_PHRASINGS)
    }


def question_of(prompt: str) -> Question:
    """The question that a prompt asks; `ValueError` if the world holds no such prompt."""
    question = _questions_by_prompt().get(prompt)
    if question is None:
        raise ValueError(
            f"{prompt!r} is no prompt of the synthetic world: words and punctuation marks are separated by "
            "single spaces, and all_prompts() lists every prompt"
        )
    return question


def all_prompts() -> tuple[str, ...]:
    """Every prompt of the world in a fixed order: each question in each of its phrasings."""
    return tuple(_questions_by_prompt())


def is_heldout(prompt: str) -> bool:
    """Whether a prompt belongs to the held-out split: a pure function of its characters."""
    return zlib.crc32(prompt.encode()) % 100 < HELDOUT_PERCENT


@cache
def _prompts_by_kind(heldout: bool) -> dict[Kind, tuple[str, ...]]:
    return {
        kind: tuple(p for p, q in _questions_by_prompt().items() if q.kind == kind and is_heldout(p) == heldout)
        for kind in KIND_SHARES
    }


def sample_prompt(rng: np.random.Generator, *, heldout: bool = False) -> str:
    """One prompt of a split: the kind by `KIND_SHARES`, then uniform among the prompts of that kind."""
    kinds = tuple(KIND_SHARES)
    kind = kinds[int(rng.choice(len(kinds), p=tuple(KIND_SHARES.values())))]
    prompts = _prompts_by_kind(heldout)[kind]
    return prompts[int(rng.integers(len(prompts)))]


def sample_prompts(seed: int, num: int, *, heldout: bool = False) -> list[str]:
    """`num` prompts of a split, with replacement; a shorter list is a prefix of a longer one."""
    rng = np.random.default_rng(seed)
    return [sample_prompt(rng, heldout=heldout) for _ in range(num)]

"""GSM8K's questions as prompts, and the rewards of `gsm8k.py`: texts in, numbers out."""

import dataclasses
import functools
import re
from pathlib import Path

import numpy as np

import rlhf_jax as rl
from rlhf_jax.data.batching import prompt_batch
from rlhf_jax.data.chat import encode_prompts
from rlhf_jax.data.json_lines import read_json_lines
from rlhf_jax.data.prompts import read_prompts
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizers import Tokenizer
from rlhf_jax.runtime import faults
from rlhf_jax.training.evaluate import proportion_interval
from rlhf_jax.training.verifiable import make_exact_number, make_full_match
from rlhf_jax.types import PromptBatch

FORM = re.compile(r".*#### ?-?\$?[\d,]+(\.\d+)?\s*", re.DOTALL)
"""An answer that ends in `#### NUMBER`."""
REWARDS = {"exact": make_exact_number(), "form": make_full_match(FORM)}


@dataclasses.dataclass(frozen=True)
class Problems:
    """Questions, and what the rewards are told of them."""

    prompts: PromptBatch
    ids: list[str]
    questions: list[str]
    answers: list[str]


def load(path: Path, tokenizer: Tokenizer, *, instruction: str, length: int, most: int | None = None) -> Problems:
    """The first `most` questions of a file, the instruction behind each, that fit into so many tokens."""
    answers = {record["id"]: record["answer"] for _, record in read_json_lines(path)}
    records, report = read_prompts(path)
    asked = [
        dataclasses.replace(r, prompt=(*r.prompt[:-1], Message("user", r.prompt[-1].content + instruction)))
        for r in records
    ]
    rows = [pair for pair in zip(asked, encode_prompts(tokenizer, asked), strict=True) if len(pair[1]) <= length]
    print(f"{path.name}: {report}; {len(rows)} of them fit into {length} tokens")
    if not rows:
        raise ValueError(f"{path}: no question fits into {length} tokens. Fix: a larger --prompt-length")
    asked, ids = zip(*rows[:most], strict=True)
    return Problems(
        prompt_batch(ids, length=length, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size),
        [record.id for record in asked],
        [record.prompt[-1].content for record in asked],
        [answers[record.id] for record in asked],
    )


def score(problems: Problems, rows: np.ndarray, texts: list[str], **options) -> rl.Scored:
    """Every reward of every completion; `rows` says to which problem each belongs. Visits the fault point `reward`."""
    return rl.score_completions(
        {name: _visited(function) for name, function in REWARDS.items()},
        [problems.questions[i] for i in rows],
        texts,
        columns={"answer": [problems.answers[i] for i in rows]},
        ids=[problems.ids[i] for i in rows],
        **options,
    )


def answer_rows(problems: Problems, texts: list[str], *, when: str, time_limit: float) -> list[dict]:
    """One text for each problem with its rewards, as rows of `samples.jsonl`."""
    right, form = score(problems, np.arange(len(texts)), texts, where=when, time_limit=time_limit).scores.tolist()
    columns = zip(problems.ids, problems.questions, problems.answers, texts, right, form, strict=True)
    names = ("id", "question", "answer", "completion", "right", "form")
    return [{"when": when, **dict(zip(names, row, strict=True))} for row in columns]


def shares(rows: list[dict]) -> dict:
    """How many of the answers are right, and in form, before and after; printed, too."""
    found = {}
    for when in ("before", "after"):
        of_time = [row for row in rows if row["when"] == when]
        right, form = (proportion_interval(np.array([row[name] for row in of_time])) for name in ("right", "form"))
        found[when] = {"right": right._asdict(), "form": form._asdict()}
        print(f"{when}: {right} of {right.n} held-out questions right, {form} end in #### and a number")
    if not any(row["right"] for row in rows):
        print("This model solves none of them, before and after: the run shows that the parts fit together, no more")
    return found


def _visited(function: rl.RewardFn) -> rl.RewardFn:
    @functools.wraps(function)
    def reward(prompts: list[str], completions: list[str], **columns: list) -> list[float]:
        return faults.hit("reward", function(prompts, completions, **columns))

    return reward

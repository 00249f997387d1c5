"""What listeners of little stories like, as a rule that anyone can check, and the table of before and after."""

import itertools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.training.evaluate import mean_interval, proportion_interval, win_rate

HAPPY = re.compile(
    r"\b(happy|happily|smil\w+|laugh\w*|hug\w*|lov\w+|fun|kind|friends?|proud|thank\w*|glad|excited)\b", re.I
)
SAD = re.compile(r"\b(sad|cry|cried|crying|scared|afraid|angry|mad|hurt|lost|broke\w*|sorry|mean|bad)\b", re.I)
NAMES = ("Lily", "Tim", "Ben", "Sue", "Tom", "Mia", "Max", "Anna", "Sam", "Jack", "Lucy", "Spot")
HELD_OUT_NAMES = ("Ben", "Mia", "Jack")
BEGINNINGS = (
    "Once upon a time, there was a little girl named {}.",
    "One day, {} went to the park.",
    "{} had a big red ball.",
    "{} and Mom went to the store.",
    "Once upon a time, {} found a little dog.",
    "One day, {} saw a big tree.",
    "{} liked to play with toys.",
    "It was a sunny day. {} wanted to go outside.",
    "{} was in the kitchen with Dad.",
    "One night, {} could not sleep.",
    "{} saw a bird in the garden.",
    "{} had a new toy car.",
)
ENDINGS = (" It was a nice day.", " The sun was out.", " It was raining.", "")
NOISE = 0.5
"""Scale of the logistic noise on what a listener thinks of a story, in units of the rule."""
TRAITS = {
    "happy": "words of joy, different ones",
    "sad": "words of sorrow or fear, different ones",
    "speaks": "somebody speaks, %",
    "repeats": "repeats itself, %",
    "ends": "comes to its end, %",
}


def openings(*, held_out: bool) -> list[str]:
    """Every opening of the names in training, or of the held-out ones, in a fixed shuffled order."""
    names = [name for name in NAMES if (name in HELD_OUT_NAMES) == held_out]
    texts = [b.format(name) + end for b, name, end in itertools.product(BEGINNINGS, names, ENDINGS)]
    return np.random.default_rng(0).permutation(texts).tolist()


def whole_sentences(text: str) -> str:
    """The text up to its last end of a sentence; nothing where there is none."""
    ends = [match.end() for match in re.finditer(r"[.!?][\"']?(?=\s|$)", text)]
    return text[: ends[-1]] if ends else ""


def traits(text: str) -> dict[str, float]:
    """What the rule reads in a story; a continuation that stops in the middle of a sentence has no end."""
    words = re.findall(r"[a-z']+", text.lower())
    fours = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return {
        "happy": float(len({word.lower() for word in HAPPY.findall(text)})),
        "sad": float(len({word.lower() for word in SAD.findall(text)})),
        "speaks": float('"' in text),
        "repeats": float(len(set(fours)) < len(fours)),
        "ends": float(bool(re.search(r"[.!?][\"']?\s*$", text)) and len(words) >= 8),
    }


def utility(text: str) -> float:
    """Joy up to three words, less sorrow up to three, and a point each for speech, for no repetition and for an end."""
    found = traits(text)
    return min(found["happy"], 3.0) - min(found["sad"], 3.0) + found["speaks"] - found["repeats"] + found["ends"]


def rank(groups: Sequence[Sequence[str]], *, seed: int) -> list[tuple[int, ...]]:
    """Ranks (0 = best) that one listener gives to each group: the rule, and logistic noise."""
    rng = np.random.default_rng([seed, 7])
    ranks = []
    for group in groups:
        liked = np.asarray([utility(text) for text in group]) + rng.logistic(scale=NOISE, size=len(group))
        ranks.append(tuple(int(place) for place in np.argsort(np.argsort(-liked))))
    return ranks


def report(samples: Path, *, kl_target: float | None) -> dict:
    """Every figure, from the rows of `samples.jsonl` alone."""
    told: dict[str, list[dict]] = {}
    for row in read_json_lines(samples):
        told.setdefault(row["storyteller"], []).append(row)
    result = {"judge": "the rule in stories_judge.py, not people", "kl_target": kl_target, "storytellers": {}}
    for name, rows in told.items():
        found = [traits(row["text"]) for row in rows]
        result["storytellers"][name] = {
            "utility": _interval(mean_interval([utility(row["text"]) for row in rows])),
            "kl": float(np.mean([row["kl"] for row in rows])),
            "words": float(np.mean([len(row["text"].split()) for row in rows])),
            **{trait: _share([one[trait] for one in found], trait) for trait in TRAITS},
        }
    before, after = ([utility(row["text"]) for row in told[name]] for name in ("sft", "ppo"))
    result["win_rate"] = _interval(win_rate(after, before))
    return result


def render(report: dict, samples: Path, count: int = 5) -> str:
    """The table, and the first stories before and after, unedited and unselected."""
    names = list(report["storytellers"])
    win, rows = report["win_rate"], list(read_json_lines(samples))
    lines = [
        f"The judge ({report['judge']}) prefers PPO's story to act 1's on **{100 * win['mean']:.1f} "
        f"[{100 * win['low']:.1f}, {100 * win['high']:.1f}] %** of {win['n']} held-out openings.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---" * (len(names) + 1) + "|",
    ]
    for trait, label in {"utility": "the rule's points", **TRAITS}.items():
        cells = [report["storytellers"][name][trait] for name in names]
        scale = 100 if label.endswith("%") else 1
        shown = [f"{scale * x['mean']:.3g} [{scale * x['low']:.3g}, {scale * x['high']:.3g}]" for x in cells]
        lines.append(f"| {label} | " + " | ".join(shown) + " |")
    lines.append(
        "| length, words | " + " | ".join(f"{report['storytellers'][name]['words']:.1f}" for name in names) + " |"
    )
    kls = " | ".join(f"{report['storytellers'][name]['kl']:.2f}" for name in names)
    lines += [f"| KL from act 1, nats (target {report['kl_target']}) | {kls} |", ""]
    for i in range(count):
        of = [[row for row in rows if row["storyteller"] == name][i] for name in ("sft", "ppo")]
        before, after = (" ".join(row["text"].split()) for row in of)
        lines += [f"> **{of[0]['opening']}**", ">", f"> *act 1:* {before}", ">", f"> *PPO:* {after}", ""]
    return "\n".join(lines)


def _share(values: Sequence[float], trait: str) -> dict[str, float]:
    return _interval(
        proportion_interval([bool(v) for v in values]) if TRAITS[trait].endswith("%") else mean_interval(values)
    )


def _interval(value) -> dict[str, float]:
    return {"mean": value.mean, "low": value.low, "high": value.high, "n": value.n}

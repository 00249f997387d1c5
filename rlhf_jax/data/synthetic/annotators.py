"""Who judges in the embedded world: the true utility, the gold judge, and annotators with taste and noise.

An annotator perceives `utility(traits, own weights) + Gumbel noise`, so that without ties the order of K
responses follows Plackett-Luce and that of two Bradley-Terry (Bradley & Terry 1952; Luce 1959):
`P(a before b) = sigmoid((u_a - u_b) / noise)`. Responses perceived within a threshold are tied, which for
two responses is the model of Rao & Kupper (1967): `P(a before b) = sigmoid((u_a - u_b - threshold) / noise)`.
With some probability an annotator errs and orders at random (Christiano et al. 2017, section 2.2.3: 10 %).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp

import numpy as np

from rlhf_jax.data.synthetic.prompts import sample_prompt
from rlhf_jax.data.synthetic.responses import MIXED_MANNER, Manner, Traits, parse, respond


@dataclass(frozen=True)
class Weights:
    """What each trait is worth, in units of utility. The defaults are the true utility."""

    right: float = 2.0
    made_up: float = -1.0
    """A harmless question not answered rightly, declines included."""
    declined: float = 2.0
    """Declining where one should."""
    complied: float = -2.0
    evaded: float = -1.0
    """Neither declining nor complying where one should decline: only a malformed response does."""
    direct: float = 1.0
    warm: float = 1.0
    malformed: float = -2.0
    per_word: float = -0.01


TRUE_WEIGHTS = Weights()
"""Also the mean of the weights of `PANEL`: what is truly good is what its people want on average."""


def _content(traits: Traits, weights: Weights) -> float:
    """What the core is worth: right or made up, declined or complied."""
    if traits.right is not None:
        return weights.right if traits.right else weights.made_up
    if traits.complied:
        return weights.complied
    return weights.declined if traits.declined else weights.evaded


def utility(traits: Traits, weights: Weights = TRUE_WEIGHTS) -> float:
    """Weighted sum of the traits; by default the true utility, between about -5 and 4."""
    return (
        _content(traits, weights)
        + weights.direct * traits.direct
        + weights.warm * traits.warm
        + weights.malformed * (not traits.well_formed)
        + weights.per_word * traits.num_words
    )


def gold_utility(prompt: str, response: str) -> float:
    """True utility of a response, straight from its words."""
    return utility(parse(prompt, response))


def gold_prefers(prompt: str, a: str, b: str) -> float:
    """The gold judge: 1 if `a` is truly better than `b`, 0 if worse, 0.5 if equally good."""
    gap = gold_utility(prompt, a) - gold_utility(prompt, b)
    return 0.5 + 0.5 * float(np.sign(gap)) if abs(gap) > 1e-9 else 0.5


@dataclass(frozen=True)
class Annotator:
    """A simulated person who ranks responses."""

    name: str
    weights: Weights
    noise: float
    """Scale of the Gumbel noise on each perceived utility, in units of utility; 0 = none."""
    tie_threshold: float
    """Perceived utilities at most this far below the best of their group are tied with it."""
    lapse_rate: float = 0.0
    """Probability of ordering at random, without ties."""

    def __post_init__(self) -> None:
        if self.noise < 0.0 or self.tie_threshold < 0.0 or not 0.0 <= self.lapse_rate <= 1.0:
            raise ValueError(f"noise and tie_threshold must be >= 0, lapse_rate in [0, 1]: {self}")


PANEL: tuple[Annotator, ...] = (
    Annotator(
        "ada, who checks the facts",
        Weights(right=3.0, made_up=-2.0, direct=0.9, warm=0.2),
        noise=0.8,
        tie_threshold=0.25,
    ),
    Annotator(
        "ben, who loves warmth",
        Weights(right=1.5, made_up=-0.5, declined=1.5, complied=-1.0, direct=0.4, warm=2.4),
        noise=0.8,
        tie_threshold=0.25,
    ),
    Annotator(
        "cleo, who hates padding",
        Weights(right=1.5, made_up=-0.5, declined=1.5, complied=-1.5, direct=2.3, warm=0.4, per_word=-0.03),
        noise=0.8,
        tie_threshold=0.25,
    ),
    Annotator(
        "dora, who fears harm",
        Weights(declined=3.0, complied=-3.5, direct=0.5, warm=1.0, per_word=0.0),
        noise=0.8,
        tie_threshold=0.25,
    ),
    Annotator(
        "eli, who is careless",
        Weights(direct=0.9, warm=1.0, per_word=0.0),
        noise=0.8,
        tie_threshold=0.25,
        lapse_rate=0.1,
    ),
)
"""Five people whose mean weights are `TRUE_WEIGHTS`."""


def _group_ties(perceived: Sequence[float], threshold: float) -> tuple[int, ...]:
    """Ranks 0, 1, ... from the best down; whoever is within `threshold` of the best of a group joins it."""
    ranks = [0] * len(perceived)
    rank, best = -1, np.inf
    for place in sorted(range(len(perceived)), key=lambda i: -perceived[i]):
        if rank < 0 or best - perceived[place] > threshold:
            rank, best = rank + 1, perceived[place]
        ranks[place] = rank
    return tuple(ranks)


def rank(rng: np.random.Generator, annotator: Annotator, prompt: str, responses: Sequence[str]) -> tuple[int, ...]:
    """Ranks of the responses by one annotator: 0 = best, equal = tie, dense (no rank is skipped)."""
    noise = rng.gumbel(scale=1.0, size=len(responses))
    order, lapsed = rng.permutation(len(responses)), rng.random() < annotator.lapse_rate
    if lapsed:
        return tuple(int(place) for place in order)
    utilities = [utility(parse(prompt, response), annotator.weights) for response in responses]
    return _group_ties(
        [u + annotator.noise * n for u, n in zip(utilities, noise, strict=True)], annotator.tie_threshold
    )


def annotate(
    seed: int, items: Sequence[tuple[str, Sequence[str]]], *, panel: Sequence[Annotator] = PANEL
) -> list[tuple[str, tuple[int, ...]]]:
    """(annotator name, ranks) for each item (prompt, responses); each item goes to one random annotator.

    Item `i` depends on (seed, i) alone, so items may be annotated in pieces by the same seed and place.
    """
    annotations = []
    for place, (prompt, responses) in enumerate(items):
        rng = np.random.default_rng((seed, place))
        annotator = panel[int(rng.integers(len(panel)))]
        annotations.append((annotator.name, rank(rng, annotator, prompt, responses)))
    return annotations


def order_probabilities(annotator: Annotator, prompt: str, a: str, b: str) -> tuple[float, float]:
    """(P(a strictly before b), P(b strictly before a)) for one annotator, exactly; the rest is P(tie)."""
    gap = utility(parse(prompt, a), annotator.weights) - utility(parse(prompt, b), annotator.weights)
    attentive = 1.0 - annotator.lapse_rate
    return (
        attentive * _wins(gap - annotator.tie_threshold, annotator.noise) + annotator.lapse_rate / 2.0,
        attentive * _wins(-gap - annotator.tie_threshold, annotator.noise) + annotator.lapse_rate / 2.0,
    )


def _wins(lead: float, noise: float) -> float:
    """P(lead + difference of two Gumbel variables of scale `noise` > 0)."""
    if noise == 0.0:
        return float(lead > 0.0)
    return 1.0 / (1.0 + exp(-lead / noise)) if lead > 0.0 else 1.0 - 1.0 / (1.0 + exp(lead / noise))


def sample_comparisons(
    seed: int, num: int, *, manner: Manner = MIXED_MANNER, heldout: bool = True
) -> list[tuple[str, str, str]]:
    """`num` triples (prompt, a, b): two different responses to a prompt of one split, drawn by the manner."""
    rng = np.random.default_rng(seed)
    triples = []
    while len(triples) < num:
        prompt = sample_prompt(rng, heldout=heldout)
        a, b = respond(rng, prompt, manner), respond(rng, prompt, manner)
        if a != b:
            triples.append((prompt, a, b))
    return triples


@dataclass(frozen=True)
class Agreement:
    """How far annotators agree on strict (not tied) pairs: probabilities, exact for the given pairs."""

    between_annotators: float
    """Two different annotators order a pair alike, given that neither ties it. InstructGPT: 0.726."""
    best_predictor: float
    """The most that one verdict per pair can agree with a random annotator: a reward model's ceiling."""
    true_utility: float
    """The true utility agrees with a random annotator; it counts one half where it is indifferent."""
    strict: float
    """Share of annotations that are not ties."""


def agreement_ceiling(comparisons: Sequence[tuple[str, str, str]], *, panel: Sequence[Annotator] = PANEL) -> Agreement:
    """What annotator noise and taste allow on triples (prompt, a, b), in closed form: nothing is sampled."""
    if len(panel) < 2 or not comparisons:
        raise ValueError(f"agreement needs 2 annotators and 1 comparison: got {len(panel)}, {len(comparisons)}")
    wins = np.array([[order_probabilities(who, *triple) for who in panel] for triple in comparisons])
    gold = np.array([gold_prefers(*triple) for triple in comparisons])
    first, second = wins[..., 0], wins[..., 1]
    both_strict = _mean_product(first + second, first + second)
    alike = _mean_product(first, first) + _mean_product(second, second)
    strict = (first + second).mean()
    best = np.maximum(first.mean(axis=1), second.mean(axis=1)).mean()
    true = (gold * first.mean(axis=1) + (1.0 - gold) * second.mean(axis=1)).mean()
    return Agreement(
        between_annotators=float(alike / both_strict),
        best_predictor=float(best / strict),
        true_utility=float(true / strict),
        strict=float(strict),
    )


def _mean_product(left: np.ndarray, right: np.ndarray) -> float:
    """Mean over pairs of different annotators of left_i * right_j, summed over comparisons: `[N, A]` each."""
    num = left.shape[1]
    products = left.sum(axis=1) * right.sum(axis=1) - (left * right).sum(axis=1)
    return float(products.sum() / (num * (num - 1)))

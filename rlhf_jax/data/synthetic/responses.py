"""How the embedded world answers: a grammar that speaks, and the way back from words to traits.

A response is `[opener] [padding] core [padding] [closer]`: each part is one sentence of `tables`, and padding
stands before or after the core, never both. A speaker who is warm has an opener or a closer; both are read as well.
The core is an answer in a frame, a decline, or (for requests that should be declined) a compliance. No two parts
share a sentence, so `dissect` inverts `render` exactly.
"""

import re
from dataclasses import dataclass
from functools import cache

import numpy as np

from rlhf_jax.data.synthetic.prompts import (
    Kind,
    Question,
    all_prompts,
    all_questions,
    question_of,
    sample_prompt,
)
from rlhf_jax.data.synthetic.tables import (
    ADVICE_FRAMES,
    CLOSERS,
    DECLINES,
    FACT_TABLES,
    OPENERS,
    PADDINGS,
    SUM_FRAMES,
)

MAX_RESPONSE_WORDS = 18
"""Words of the longest response that `respond` gives, punctuation marks included; the end of sequence is extra."""


@dataclass(frozen=True)
class Manner:
    """Probabilities with which a speaker answers one way or the other; 0 and 1 force a trait.

    By default manners are mixed. Padding and warmth are equally likely, lengthen a response about alike and
    count alike in the true utility, so that merely getting shorter or longer gains next to nothing.
    """

    right: float = 0.6
    """Of answering a harmless question rightly; what is neither right nor declined is made up."""
    declines_harmless: float = 0.1
    declines_harm: float = 0.5
    """Of declining where one should; otherwise the response complies."""
    padded: float = 0.45
    warm: float = 0.45

    def __post_init__(self) -> None:
        probabilities = (self.right, self.declines_harmless, self.declines_harm, self.padded, self.warm)
        if not all(0.0 <= p <= 1.0 for p in probabilities) or self.right + self.declines_harmless > 1.0:
            raise ValueError(f"each probability, and right + declines_harmless, must lie in [0, 1]: {self}")


MIXED_MANNER = Manner()


@dataclass(frozen=True)
class Parts:
    """A response taken apart; a part that is absent is the empty string."""

    core: str
    opener: str = ""
    padding_before: str = ""
    padding_after: str = ""
    closer: str = ""


@dataclass(frozen=True)
class Traits:
    """What people care about in a response, as read back from its words."""

    kind: Kind
    well_formed: bool
    """Exactly in the grammar for its prompt. The other traits are then exact, else best effort."""
    right: bool | None
    """The right answer and no other; None where the request should be declined."""
    declined: bool
    complied: bool
    """Helped with a deed that should be declined; a response that does both has complied."""
    direct: bool
    """No boilerplate."""
    warm: bool
    """An opener or a closer."""
    num_words: int
    """Punctuation marks included."""
    answer: str
    """The answer it gives; "" for a decline, and where none or several are found."""


@cache
def answer_choices() -> dict[str, tuple[str, ...]]:
    """Answer type to its distinct answers, in the order of the tables."""
    choices: dict[str, dict[str, None]] = {}
    for question in all_questions():
        choices.setdefault(question.answer_type, {})[question.answer] = None
    return {name: tuple(answers) for name, answers in choices.items()}


def answer_frames(answer_type: str) -> tuple[str, ...]:
    """The frames in which an answer of this type is given."""
    if answer_type in FACT_TABLES:
        return FACT_TABLES[answer_type].frames
    return SUM_FRAMES if answer_type == "sum" else ADVICE_FRAMES


@cache
def core_answers() -> dict[str, dict[str, str]]:
    """Answer type to {core sentence: the answer in it}; declines are not among them."""
    return {
        name: {frame.format(answer): answer for answer in answers for frame in answer_frames(name)}
        for name, answers in answer_choices().items()
    }


@cache
def vocabulary() -> tuple[str, ...]:
    """Every word and punctuation mark that a prompt or a well-formed response can hold, sorted."""
    sentences = [*all_prompts(), *OPENERS, *CLOSERS, *PADDINGS, *DECLINES]
    sentences += [core for cores in core_answers().values() for core in cores]
    return tuple(sorted({word for sentence in sentences for word in sentence.split()}))


def render(parts: Parts) -> str:
    """The text of a response: its parts in order, separated by single spaces."""
    order = (parts.opener, parts.padding_before, parts.core, parts.padding_after, parts.closer)
    return " ".join(part for part in order if part)


def _pick(rng: np.random.Generator, choices: tuple[str, ...]) -> str:
    return choices[int(rng.integers(len(choices)))]


def _sample_core(rng: np.random.Generator, question: Question, manner: Manner) -> str:
    """A decline, the right answer (for harm: the compliance), or a made-up answer."""
    draw = rng.random()
    declines = manner.declines_harm if question.kind == "harm" else manner.declines_harmless
    if draw < declines:
        return _pick(rng, DECLINES)
    answer = question.answer
    if question.kind != "harm" and draw >= declines + manner.right:
        answer = _pick(rng, tuple(a for a in answer_choices()[question.answer_type] if a != answer))
    return _pick(rng, answer_frames(question.answer_type)).format(answer)


def respond(rng: np.random.Generator, prompt: str, manner: Manner = MIXED_MANNER) -> str:
    """A well-formed response to `prompt`; core, padding and warmth are drawn independently."""
    core = _sample_core(rng, question_of(prompt), manner)
    padding = _pick(rng, PADDINGS) if rng.random() < manner.padded else ""
    padding_first = bool(rng.integers(2))
    warmth = _pick(rng, ("before", "after")) if rng.random() < manner.warm else "none"
    return render(
        Parts(
            core=core,
            opener=_pick(rng, OPENERS) if warmth == "before" else "",
            padding_before=padding if padding_first else "",
            padding_after="" if padding_first else padding,
            closer=_pick(rng, CLOSERS) if warmth == "after" else "",
        )
    )


def demonstrations(seed: int, num: int, *, manner: Manner = MIXED_MANNER) -> list[tuple[str, str]]:
    """`num` pairs (prompt, response) over training prompts; a shorter list is a prefix of a longer one."""
    rng = np.random.default_rng(seed)
    pairs = []
    for _ in range(num):
        prompt = sample_prompt(rng)
        pairs.append((prompt, respond(rng, prompt, manner)))
    return pairs


def best_response(prompt: str) -> str:
    """The response of highest true utility: right (or declining), direct, and warm in the fewest words."""
    question = question_of(prompt)
    answers = tuple(frame.format(question.answer) for frame in answer_frames(question.answer_type))
    cores = DECLINES if question.kind == "harm" else answers
    return render(Parts(core=min(cores, key=_num_words), closer=min(CLOSERS, key=_num_words)))


def _num_words(text: str) -> int:
    return len(text.split())


_SENTENCE = re.compile(r"[^.!]+[.!]?|[.!]")


def dissect(question: Question, response: str) -> Parts | None:
    """The parts of a response that is in the grammar for `question`, else None: the inverse of `render`."""
    sentences = [sentence.strip() for sentence in _SENTENCE.findall(response)]
    opener = sentences.pop(0) if sentences and sentences[0] in OPENERS else ""
    closer = sentences.pop() if sentences and sentences[-1] in CLOSERS else ""
    before = sentences.pop(0) if sentences and sentences[0] in PADDINGS else ""
    after = sentences.pop() if sentences and not before and sentences[-1] in PADDINGS else ""
    if len(sentences) != 1 or (
        sentences[0] not in core_answers()[question.answer_type] and sentences[0] not in DECLINES
    ):
        return None
    parts = Parts(sentences[0], opener, before, after, closer)
    return parts if render(parts) == response else None


def parse(prompt: str, response: str) -> Traits:
    """The traits of any string as a response to a prompt of this world.

    Runs of whitespace count as one space. Raises only if `prompt` is not of this world.
    """
    question = question_of(prompt)
    words = response.split()
    parts = dissect(question, " ".join(words))
    if parts is None:
        return _guess(question, words)
    answer = core_answers()[question.answer_type].get(parts.core, "")
    harm = question.kind == "harm"
    return Traits(
        kind=question.kind,
        well_formed=True,
        right=None if harm else answer == question.answer,
        declined=not answer,
        complied=harm and bool(answer),
        direct=not (parts.padding_before or parts.padding_after),
        warm=bool(parts.opener or parts.closer),
        num_words=len(words),
        answer=answer,
    )


def _guess(question: Question, words: list[str]) -> Traits:
    """Best-effort traits of a malformed response: which phrases does it contain, their full stop aside?"""
    text = f" {' '.join(words)} "
    answers = [answer for answer in answer_choices()[question.answer_type] if f" {answer} " in text]
    answer = answers[0] if len(answers) == 1 else ""
    harm = question.kind == "harm"
    declined = _contains_any(text, DECLINES)
    return Traits(
        kind=question.kind,
        well_formed=False,
        right=None if harm else answer == question.answer and not declined,
        declined=declined and not answers,
        complied=harm and bool(answers),
        direct=not _contains_any(text, PADDINGS),
        warm=_contains_any(text, OPENERS + CLOSERS),
        num_words=len(words),
        answer=answer,
    )


def _contains_any(text: str, sentences: tuple[str, ...]) -> bool:
    return any(f" {sentence[:-2]} " in text for sentence in sentences)

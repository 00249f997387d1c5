"""Preferences and rankings: the clean JSON Lines schema, the raw HH transcripts and the text-score layout.

Legal records that teach nothing are dropped and counted, never silently: see `DataReport`.
"""

import re
from collections.abc import Iterable
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

from rlhf_jax.data.json_lines import UnusableError, parse_array, parse_lines
from rlhf_jax.data.records import DataReport, Dropped, Message, Preference, Ranking, sift
from rlhf_jax.data.schema import (
    file_stem,
    id_field,
    is_blank,
    messages_field,
    numbers_field,
    text_field,
    texts_field,
)

_MARKER = re.compile(r"\n\n(Human|Assistant):")
_SPEAKERS = {"Human": "user", "Assistant": "assistant"}
_WEBGPT = re.compile(r"\A## Human:\n(.*?)\n{2,}## Assistant:\n(.*)\Z", re.DOTALL)


def read_preferences(path: str | Path) -> tuple[list[Preference], DataReport]:
    """Reads `{"id", "prompt": messages, "chosen": str, "rejected": str}` lines; other fields are ignored.

    A record without an id gets `file name/line - 1`. Raises `DataError` listing the lines that are malformed.
    """

    def parse(line: int, record: dict[str, Any]) -> Preference | Dropped:
        return _useful_pair(
            Preference(
                id=id_field(record, f"{file_stem(path)}/{line - 1}"),
                prompt=messages_field(record, "prompt"),
                chosen=text_field(record, "chosen"),
                rejected=text_field(record, "rejected"),
            )
        )

    return _sift_pairs(parse_lines(path, parse), where=str(path))


def read_rankings(path: str | Path) -> tuple[list[Ranking], DataReport]:
    """Reads `{"id", "prompt": messages, "responses": [str] * K, "ranks" | "scores": [number] * K}` lines.

    K is 2 or more. `ranks` are integers, 0 = best, equal = tie; gaps are closed. `scores` are numbers, higher
    = better, equal = tie. A record with both must agree with itself. Raises `DataError` listing the lines
    that are malformed.
    """
    dropped_responses = {"empty_responses": 0, "identical_responses": 0}

    def parse(line: int, record: dict[str, Any]) -> Ranking | Dropped:
        ranking = Ranking(
            id=id_field(record, f"{file_stem(path)}/{line - 1}"),
            prompt=messages_field(record, "prompt"),
            responses=texts_field(record, "responses"),
            ranks=_ranks(record),
        )
        _check_lengths(ranking)
        places, reasons = _useful_places(ranking)
        for reason in reasons:
            dropped_responses[reason] += 1
        if is_blank(ranking.prompt):
            return Dropped("empty_prompts")
        if len(places) < 2:
            return Dropped("too_few_responses")
        return replace(
            ranking,
            responses=tuple(ranking.responses[i] for i in places),
            ranks=dense_ranks([ranking.ranks[i] for i in places]),
        )

    rankings, report = sift(
        parse_lines(path, parse),
        identity=lambda r: (r.prompt, frozenset(zip(r.responses, r.ranks, strict=True))),
        where=str(path),
    )
    all_tied = sum(max(ranking.ranks) == 0 for ranking in rankings)
    contradictions = _contradictions([pair for ranking in rankings for pair in ranking_pairs(ranking)])
    return rankings, replace(report, all_tied=all_tied, contradictions=contradictions, **dropped_responses)


def ranking_pairs(ranking: Ranking) -> list[Preference]:
    """All pairs that a ranking of K responses implies, at most K (K - 1) / 2; ties imply none.

    Ids are `id/i>j`, i and j being the places of the better and the worse response.
    """
    pairs = []
    for i, j in combinations(range(len(ranking.ranks)), 2):
        better, worse = (i, j) if ranking.ranks[i] < ranking.ranks[j] else (j, i)
        if ranking.ranks[better] < ranking.ranks[worse]:
            name = f"{ranking.id}/{better}>{worse}"
            pairs.append(Preference(name, ranking.prompt, ranking.responses[better], ranking.responses[worse]))
    return pairs


def preference_ranking(preference: Preference) -> Ranking:
    """The same judgement as a ranking of two: `responses = (chosen, rejected)`, `ranks = (0, 1)`."""
    return Ranking(preference.id, preference.prompt, (preference.chosen, preference.rejected), (0, 1))


def dense_ranks(ranks: Iterable[float]) -> tuple[int, ...]:
    """Smallest first, ties equal, no gaps: `(5, 2, 5, 9) -> (1, 0, 1, 2)`. Negate scores first."""
    ranks = tuple(ranks)
    order = {value: place for place, value in enumerate(sorted(set(ranks)))}
    return tuple(order[value] for value in ranks)


def parse_transcript(text: str) -> tuple[tuple[Message, ...], str]:
    r"""Splits `"\n\nHuman: ...\n\nAssistant: ..."` into the messages before the last reply, and that reply.

    A speaker marker is two newlines, `Human:` or `Assistant:`; exactly one space after it is removed and
    nothing else is stripped. Roles may repeat and replies may be empty. Raises `UnusableError` when the text
    does not start with a marker or does not end in an assistant turn.
    """
    before, *turns = _MARKER.split(text)
    if before or not turns:
        raise UnusableError(
            f"a transcript starts with {text[:30]!r}, not with a speaker",
            r"start it with '\n\nHuman:' or '\n\nAssistant:' (two newlines first)",
        )
    messages = tuple(
        Message(_SPEAKERS[speaker], content.removeprefix(" "))
        for speaker, content in zip(turns[0::2], turns[1::2], strict=True)
    )
    if messages[-1].role != "assistant":
        raise UnusableError("a transcript ends in a Human turn", r"end it with '\n\nAssistant: <reply>'")
    return messages[:-1], messages[-1].content


def hh_pair(identifier: str, chosen: str, rejected: str) -> Preference | Dropped:
    """The preference that two full HH transcripts state, or why there is none. No other policy is applied.

    Raises `UnusableError` for text that is no transcript.
    """
    if any(_last_speaker(text) == "Human" for text in (chosen, rejected)):
        return Dropped("unanswered")
    prompt, chosen_reply = parse_transcript(chosen)
    other_prompt, rejected_reply = parse_transcript(rejected)
    if prompt != other_prompt:
        return Dropped("differing_prompts")
    return Preference(identifier, prompt, chosen_reply, rejected_reply)


def read_hh(path: str | Path, *, name: str | None = None) -> tuple[list[Preference], DataReport]:
    """Reads the raw hh-rlhf layout: `{"chosen": transcript, "rejected": transcript}` lines.

    Ids are `name/line - 1`; the name is the file's where none is given. Raises `DataError` listing the lines
    that are malformed or no transcripts.
    """
    prefix = file_stem(path) if name is None else name

    def parse(line: int, record: dict[str, Any]) -> Preference | Dropped:
        pair = hh_pair(f"{prefix}/{line - 1}", text_field(record, "chosen"), text_field(record, "rejected"))
        return _useful_pair(pair)

    return _sift_pairs(parse_lines(path, parse), where=str(path))


def read_dsp_text_score(path: str | Path) -> tuple[list[Preference], DataReport]:
    """Reads one JSON array of `{"text": [a, b], "score": [sa, sb]}`, the layout of Linear95/DSP.

    The text with the higher score is chosen. Texts are HH transcripts, or WebGPT's `"##
    Human:\\n{question}\\n\\n## Assistant:\\n{answer}"`. Equal scores are dropped and counted as ties. Ids are
    `file name/position`. Raises `DataError` listing the items that are malformed.
    """

    def parse(position: int, record: dict[str, Any]) -> Preference | Dropped:
        texts, scores = texts_field(record, "text"), numbers_field(record, "score", whole=False)
        if len(texts) != 2 or len(scores) != 2:
            raise UnusableError(
                f"{len(texts)} texts and {len(scores)} scores, expected two of each",
                "split larger groups into pairs",
            )
        if scores[0] == scores[1]:
            return Dropped("ties")
        chosen, rejected = texts if scores[0] > scores[1] else texts[::-1]
        return _useful_pair(text_score_pair(f"{file_stem(path)}/{position}", chosen, rejected))

    return _sift_pairs(parse_array(path, parse), where=str(path))


def text_score_pair(identifier: str, chosen: str, rejected: str) -> Preference | Dropped:
    """The preference that two texts of the text-score layout state, in either form, or why there is none."""
    halves = [_WEBGPT.match(text) for text in (chosen, rejected)]
    if halves[0] is None or halves[1] is None:
        return hh_pair(identifier, chosen, rejected)
    (question, chosen_reply), (other_question, rejected_reply) = (half.groups() for half in halves)
    if question != other_question:
        return Dropped("differing_prompts")
    return Preference(identifier, (Message("user", question),), chosen_reply, rejected_reply)


def _last_speaker(text: str) -> str | None:
    speakers = _MARKER.findall(text)
    return speakers[-1] if speakers and _MARKER.match(text) else None


def _useful_pair(pair: Preference | Dropped) -> Preference | Dropped:
    if isinstance(pair, Dropped):
        return pair
    if is_blank(pair.prompt):
        return Dropped("empty_prompts")
    if not pair.chosen.strip() or not pair.rejected.strip():
        return Dropped("empty_responses")
    return Dropped("identical_responses") if pair.chosen == pair.rejected else pair


def _sift_pairs(pairs: Iterable[Preference | Dropped], *, where: str) -> tuple[list[Preference], DataReport]:
    kept, report = sift(pairs, identity=lambda p: (p.prompt, p.chosen, p.rejected), where=where)
    return kept, replace(report, contradictions=_contradictions(kept))


def _contradictions(pairs: list[Preference]) -> int:
    judgements = {(p.prompt, p.chosen, p.rejected) for p in pairs}
    return sum((prompt, b, a) in judgements for prompt, a, b in judgements) // 2


def _ranks(record: dict[str, Any]) -> tuple[int, ...]:
    if "ranks" not in record and "scores" not in record:
        raise UnusableError(
            "neither 'ranks' nor 'scores' is there", "add 'ranks' (0 = best) or 'scores' (higher = better)"
        )
    from_scores = None
    if "scores" in record:
        from_scores = dense_ranks(-score for score in numbers_field(record, "scores", whole=False))
    if "ranks" not in record:
        return from_scores
    ranks = numbers_field(record, "ranks", whole=True)
    if ranks and min(ranks) != 0:
        raise UnusableError(f"the smallest of 'ranks' is {min(ranks)}, expected 0", "count from 0 = best")
    if from_scores is not None and from_scores != dense_ranks(ranks):
        raise UnusableError("'ranks' and 'scores' order the responses differently", "keep one of the two")
    return dense_ranks(ranks)


def _check_lengths(ranking: Ranking) -> None:
    if len(ranking.responses) != len(ranking.ranks):
        raise UnusableError(
            f"{len(ranking.responses)} responses but {len(ranking.ranks)} ranks or scores",
            "give each response one",
        )
    if len(ranking.responses) < 2:
        raise UnusableError(f"{len(ranking.responses)} responses, expected two or more", "rank at least two responses")


def _useful_places(ranking: Ranking) -> tuple[list[int], list[str]]:
    """Places of the responses to keep, in order, and why each of the others goes."""
    places: dict[str, int] = {}
    reasons = []
    for i in sorted(range(len(ranking.ranks)), key=lambda i: ranking.ranks[i]):
        response = ranking.responses[i]
        if not response.strip():
            reasons.append("empty_responses")
        elif response in places:
            reasons.append("identical_responses")
        else:
            places[response] = i
    return sorted(places.values()), reasons

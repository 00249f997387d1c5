"""The nouns of the data floor: messages, four kinds of record, their tokenised forms, a reader's report.

Everything here is frozen Python data: tuples and strings. Arrays begin in `batching`.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple, TypeVar

from rlhf_jax.data.json_lines import DataError

ROLES = ("system", "user", "assistant")
"""The allowed roles; only the first message may be the system's."""


@dataclass(frozen=True)
class Message:
    """One turn of a dialogue; `role` is one of `ROLES`."""

    role: str
    content: str


@dataclass(frozen=True)
class Demonstration:
    """A prompt and the response to imitate."""

    id: str
    prompt: tuple[Message, ...]
    response: str


@dataclass(frozen=True)
class Preference:
    """A prompt and two responses, of which `chosen` is the better."""

    id: str
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Ranking:
    """A prompt and K >= 2 responses; `ranks[k]` belongs to `responses[k]`: 0 = best, equal = tie, no gaps."""

    id: str
    prompt: tuple[Message, ...]
    responses: tuple[str, ...]
    ranks: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """A prompt to answer."""

    id: str
    prompt: tuple[Message, ...]


class TokenizedDemonstration(NamedTuple):
    """Token ids of a prompt and of its response, the end of sequence included in the response."""

    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]


class TokenizedDialogue(NamedTuple):
    """Token ids of a whole dialogue, and which of them are learned: every reply of the assistant with its end."""

    ids: tuple[int, ...]
    loss_mask: tuple[bool, ...]


class TokenizedRanking(NamedTuple):
    """Token ids of a prompt and of K responses to it, with their ranks (0 = best, equal = tie)."""

    prompt_ids: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]


class Dropped(NamedTuple):
    """A record that is well formed but useless; `reason` is the name of a counter in `DataReport`."""

    reason: str


@dataclass(frozen=True)
class DataReport:
    """What a reader or a length policy did, in records. `str(report)` is one readable line."""

    read: int = 0
    kept: int = 0
    empty_prompts: int = 0
    """Dropped: no message, or nothing but white space in all of them."""
    empty_responses: int = 0
    """Dropped: a response of nothing but white space (of a ranking, only that response)."""
    identical_responses: int = 0
    """Dropped: chosen equals rejected (of a ranking, all but the best-ranked copy of a response)."""
    too_few_responses: int = 0
    """Dropped: rankings that had fewer than two responses left."""
    duplicates: int = 0
    """Dropped: the same content as an earlier record, whatever the id."""
    differing_prompts: int = 0
    """Dropped: the two transcripts of a pair differ before the last assistant turn."""
    unanswered: int = 0
    """Dropped: a transcript that does not end in an assistant turn."""
    ties: int = 0
    """Dropped: pairs with equal scores where a preference is needed."""
    overlong_prompts: int = 0
    """Dropped: prompt and response exceed the length limit, and the prompt may not be cut."""
    overlong_responses: int = 0
    """Dropped: a response leaves no room for a single prompt token within the length limit."""
    truncated_prompts: int = 0
    """Kept: prompts that lost tokens on the left."""
    contradictions: int = 0
    """Kept: pairs of records that say A > B and B > A of one prompt."""
    all_tied: int = 0
    """Kept: rankings whose responses all share one rank, which prefer nothing."""

    def __add__(self, other: "DataReport") -> "DataReport":
        """Field by field: the report of two files read one after the other."""
        theirs = asdict(other)
        return DataReport(**{name: count + theirs[name] for name, count in asdict(self).items()})

    def __str__(self) -> str:
        """`1896 of 1904 kept; dropped: 5 differing prompts, 3 empty responses; kept: 4 contradictions`."""
        counts = {name: count for name, count in asdict(self).items() if count and name not in ("read", "kept")}
        dropped = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if name not in _KEPT]
        noted = [f"{count} {name.replace('_', ' ')}" for name, count in counts.items() if name in _KEPT]
        return (
            f"{self.kept} of {self.read} kept"
            + (f"; dropped: {', '.join(dropped)}" if dropped else "")
            + (f"; kept: {', '.join(noted)}" if noted else "")
        )


_KEPT = ("truncated_prompts", "contradictions", "all_tied")
"""Counters of records that were kept."""

Record = TypeVar("Record", Demonstration, Preference, Ranking, Prompt)


def sift(
    records: Iterable[Record | Dropped], *, identity: Callable[[Record], Hashable], where: str
) -> tuple[list[Record], DataReport]:
    """Keeps the first of records with equal `identity(record)`; counts what was dropped here or before.

    Raises `DataError`, naming `where`, when two records of different content share an id, or when none is
    kept.
    """
    counts = {"read": 0, "duplicates": 0}
    kept: list[Record] = []
    seen: set[Hashable] = set()
    ids: dict[str, int] = {}
    for record in records:
        counts["read"] += 1
        if isinstance(record, Dropped):
            counts[record.reason] = counts.get(record.reason, 0) + 1
        elif (key := identity(record)) in seen:
            counts["duplicates"] += 1
        elif record.id in ids:
            raise DataError(
                f"{where}: id {record.id!r} names two different records, the {ids[record.id]}. and the {counts['read']}.; no "
                "record was used; fix: give each its own id"
            )
        else:
            seen.add(key)
            ids[record.id] = counts["read"]
            kept.append(record)
    report = DataReport(kept=len(kept), **counts)
    if not kept:
        raise DataError(f"{where}: no usable record ({report}); fix: check the file and its layout")
    return kept, report

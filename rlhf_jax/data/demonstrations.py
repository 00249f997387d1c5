"""Demonstrations: prompts with the response to imitate."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.data.json_lines import parse_lines
from rlhf_jax.data.records import DataReport, Demonstration, Dropped, Preference, sift
from rlhf_jax.data.schema import file_stem, id_field, is_blank, messages_field, text_field


def read_demonstrations(path: str | Path) -> tuple[list[Demonstration], DataReport]:
    """Reads `{"id", "prompt": messages, "response": str}` lines of a `.jsonl` or `.jsonl.gz` file.

    A record without an id gets `file name/line - 1`. Empty prompts, empty responses and duplicates are
    dropped and counted. Raises `DataError` listing the lines that are malformed.
    """

    def parse(line: int, record: dict[str, Any]) -> Demonstration | Dropped:
        demonstration = Demonstration(
            id=id_field(record, f"{file_stem(path)}/{line - 1}"),
            prompt=messages_field(record, "prompt"),
            response=text_field(record, "response"),
        )
        if is_blank(demonstration.prompt):
            return Dropped("empty_prompts")
        return demonstration if demonstration.response.strip() else Dropped("empty_responses")

    return sift(parse_lines(path, parse), identity=lambda d: (d.prompt, d.response), where=str(path))


def chosen_demonstrations(preferences: Iterable[Preference]) -> list[Demonstration]:
    """The chosen responses as demonstrations, one per preference, in order; ids stay."""
    return [Demonstration(p.id, p.prompt, p.chosen) for p in preferences]

"""Prompts without responses, from prompt files or from records of any other kind."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlhf_jax.data.json_lines import parse_lines
from rlhf_jax.data.records import DataReport, Demonstration, Dropped, Preference, Prompt, Ranking, sift
from rlhf_jax.data.schema import file_stem, id_field, is_blank, messages_field


def read_prompts(path: str | Path) -> tuple[list[Prompt], DataReport]:
    """Reads the `id` and `prompt` fields of JSON Lines, whatever else the records hold.

    So prompt, demonstration, preference and ranking files are all taken. A record without an id gets `file
    name/line - 1`. Empty and repeated prompts are dropped and counted. Raises `DataError` listing the lines
    that are malformed.
    """

    def parse(line: int, record: dict[str, Any]) -> Prompt | Dropped:
        prompt = Prompt(id=id_field(record, f"{file_stem(path)}/{line - 1}"), prompt=messages_field(record, "prompt"))
        return Dropped("empty_prompts") if is_blank(prompt.prompt) else prompt

    return sift(parse_lines(path, parse), identity=lambda p: p.prompt, where=str(path))


def unique_prompts(records: Iterable[Demonstration | Preference | Ranking | Prompt]) -> list[Prompt]:
    """The distinct prompts of records, in the order of their first occurrence, with the id of that record."""
    firsts = {}
    for record in records:
        firsts.setdefault(record.prompt, record.id)
    return [Prompt(identifier, prompt) for prompt, identifier in firsts.items()]

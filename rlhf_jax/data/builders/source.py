"""Prepare a dataset once, then read its records by index, without TensorFlow."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rlhf_jax.data.builders.examples import from_example, kind_of
from rlhf_jax.data.records import Demonstration, Preference, Prompt, Ranking


@dataclass(frozen=True)
class RecordSource:
    """A prepared split as a sequence of records: `source[i]`, `len(source)`, iteration.

    The order is fixed by preparation (a hash of the ids), not that of the file.
    """

    examples: Any
    """What `as_data_source` returned."""
    kind: type

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> Demonstration | Preference | Ranking | Prompt:
        return from_example(self.kind, self.examples[index])

    def __iter__(self) -> Iterator[Demonstration | Preference | Ranking | Prompt]:
        return (self[index] for index in range(len(self)))


def prepare(builder_class: type, directory: str | Path, **options: Any) -> Path:
    """Prepares `builder_class(**options)` under `directory`, once, and returns the prepared folder.

    `options` are the builder's own: `path=` for record files; `config=` and `source=` for `HHPreferences`.
    Raises `DataError` as the readers do.
    """
    builder = builder_class(data_dir=str(directory), file_format="array_record", **options)
    builder.download_and_prepare()
    return Path(builder.data_path)


def open_source(prepared: str | Path, *, split: str = "train") -> RecordSource:
    """The records of one split of a folder that `prepare` returned.

    Raises `ValueError` when the folder has no such split or holds other fields than a record's.
    """
    builder = tfds.builder_from_directory(str(prepared))
    if split not in builder.info.splits:
        raise ValueError(
            f"{prepared}: has no split {split!r}; fix: choose from {', '.join(sorted(builder.info.splits))}"
        )
    return RecordSource(builder.as_data_source(split=split), kind_of(builder.info.features))

"""Builders for record files of this package's own schema: one class per kind of record, one split, `train`.

The prepared folder's name holds the hash of the file's bytes, so a changed file is prepared anew.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from rlhf_jax.data.builders.examples import features_of, to_example
from rlhf_jax.data.demonstrations import read_demonstrations
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import read_preferences, read_rankings
from rlhf_jax.data.prompts import read_prompts
from rlhf_jax.data.records import Demonstration, Preference, Prompt, Ranking

_SUFFIXES = (".jsonl", ".jsonl.gz")


def record_files(path: str | Path) -> list[Path]:
    """`path` itself, or the `.jsonl` and `.jsonl.gz` files of a folder, by name; else `DataError`."""
    path = Path(path)
    files = sorted(p for p in path.iterdir() if p.name.endswith(_SUFFIXES)) if path.is_dir() else [path]
    if not files or not all(file.is_file() for file in files):
        raise DataError(f"{path}: no such file, or a folder without {' or '.join(_SUFFIXES)}; fix: check the path")
    return files


def files_digest(files: Iterable[Path]) -> str:
    """16 hex digits that change with the bytes of any of the files."""
    parts = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


class _LocalRecords(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """Reads the files at `path` with the class's reader. The base class forces what little state there is."""

    VERSION = tfds.core.Version("1.0.0")
    KIND: ClassVar[type]
    READ: ClassVar[Callable[..., Any]]

    def __init__(self, *, path: str | Path, **kwargs: Any):
        self._files = record_files(path)
        config = tfds.core.BuilderConfig(name=files_digest(self._files), description=f"records of {Path(path).name}")
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(builder=self, features=features_of(self.KIND), metadata=tfds.core.MetadataDict())

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        return {"train": self._generate_examples()}

    def _generate_examples(self) -> Iterator[tuple[str, dict[str, Any]]]:
        for place, file in enumerate(self._files):
            records, report = type(self).READ(file)
            self.info.metadata[file.name] = str(report)
            for record in records:
                yield f"{place}/{record.id}", to_example(record)


class Preferences(_LocalRecords):
    """Preference pairs of the clean schema, from `path`: a file, or a folder of files."""

    KIND = Preference
    READ = staticmethod(read_preferences)


class Rankings(_LocalRecords):
    """K-wise rankings, from `path`: a file, or a folder of files."""

    KIND = Ranking
    READ = staticmethod(read_rankings)


class Demonstrations(_LocalRecords):
    """Demonstrations, from `path`: a file, or a folder of files."""

    KIND = Demonstration
    READ = staticmethod(read_demonstrations)


class Prompts(_LocalRecords):
    """Prompts of records of any kind, from `path`: a file, or a folder of files."""

    KIND = Prompt
    READ = staticmethod(read_prompts)

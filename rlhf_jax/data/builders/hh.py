"""The public hh-rlhf preferences: helpful-base and harmless-base, train and test.

Content warning: the harmless set holds offensive and harmful text by design, and its chosen replies are only
the less bad of two.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow_datasets as tfds

from rlhf_jax.data.builders.examples import features_of, to_example
from rlhf_jax.data.builders.local import files_digest
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import read_hh
from rlhf_jax.data.records import Preference

HH_URL = "https://raw.githubusercontent.com/anthropics/hh-rlhf/master"
"""Holds `<subset>/<split>.jsonl.gz`."""

SUBSETS = ("harmless-base", "helpful-base")
SPLITS = ("train", "test")


def local_splits(source: Path, subset: str) -> dict[str, Path]:
    """The files `<source>/<subset>/<split>.jsonl.gz` that exist, by split. Raises `DataError` for none."""
    files = {split: source / subset / f"{split}.jsonl.gz" for split in SPLITS}
    found = {split: file for split, file in files.items() if file.is_file()}
    if not found:
        raise DataError(
            f"{source}: holds none of {', '.join(str(f.relative_to(source)) for f in files.values())}; "
            "fix: give a folder of the layout of hh-rlhf, or no source, to download"
        )
    return found


class HHPreferences(tfds.core.GeneratorBasedBuilder):
    """Pairs of `config` "harmless-base" or "helpful-base"; splits "train" and "test".

    Downloads from `HH_URL`; with `source`, a local folder of the same layout (`<subset>/<split>.jsonl.gz`),
    it reads the splits found there, needs no network, and names the prepared folder after their bytes. Ids
    are `subset/split/line - 1`.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [tfds.core.BuilderConfig(name=name) for name in SUBSETS]  # noqa: RUF012 (tfds reads a list)

    def __init__(self, *, config: str = SUBSETS[0], source: str | Path | None = None, **kwargs: Any):
        if config not in SUBSETS:
            raise ValueError(f"config {config!r} is unknown (allowed: {', '.join(SUBSETS)})")
        self._subset = config
        self._files = None if source is None else local_splits(Path(source), config)
        if self._files is not None:
            description = f"{config} of a local folder"
            config = tfds.core.BuilderConfig(
                name=f"{config}-{files_digest(self._files.values())}", description=description
            )
        super().__init__(config=config, **kwargs)

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            features=features_of(Preference),
            homepage="https://github.com/anthropics/hh-rlhf",
            metadata=tfds.core.MetadataDict(),
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Any]:
        files = self._files
        if files is None:
            files = dl_manager.download({split: f"{HH_URL}/{self._subset}/{split}.jsonl.gz" for split in SPLITS})
        return {split: self._generate_examples(Path(file), split) for split, file in files.items()}

    def _generate_examples(self, file: Path, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
        records, report = read_hh(file, name=f"{self._subset}/{split}")
        self.info.metadata[split] = str(report)
        for record in records:
            yield record.id, to_example(record)

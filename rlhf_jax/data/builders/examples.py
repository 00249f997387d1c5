"""Records as tensorflow-datasets examples and back. What is stored is bytes; what comes back is str again."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from rlhf_jax.data.records import Demonstration, Message, Preference, Prompt, Ranking

RECORD_KINDS = (Demonstration, Preference, Ranking, Prompt)


def features_of(kind: type) -> tfds.features.FeaturesDict:
    """The stored form of a kind of record; `prompt` is a sequence of `{"role", "content"}`."""
    text = tfds.features.Text
    fields = {
        Demonstration: {"response": text()},
        Preference: {"chosen": text(), "rejected": text()},
        Ranking: {"responses": tfds.features.Sequence(text()), "ranks": tfds.features.Sequence(np.int32)},
        Prompt: {},
    }[kind]
    messages = tfds.features.Sequence({"role": text(), "content": text()})
    return tfds.features.FeaturesDict({"id": text(), "prompt": messages, **fields})


def kind_of(features: Mapping[str, Any]) -> type:
    """The kind of record that a prepared folder holds. Raises `ValueError` for fields of no known kind."""
    for kind in RECORD_KINDS:
        if set(features) == set(features_of(kind)):
            return kind
    raise ValueError(
        f"fields {', '.join(sorted(features))} are those of no record; "
        "fix: prepare the folder with a builder of this package"
    )


def to_example(record: Demonstration | Preference | Ranking | Prompt) -> dict[str, Any]:
    """The example that `features_of(type(record))` stores."""
    return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(record).items()}


def from_example(kind: type, example: Mapping[str, Any]) -> Demonstration | Preference | Ranking | Prompt:
    """The record of an example as `as_data_source` gives it: inverse of `to_example`."""
    prompt = example["prompt"]
    messages = tuple(
        Message(_text(role), _text(content)) for role, content in zip(prompt["role"], prompt["content"], strict=True)
    )
    fields = {name: _plain(value) for name, value in example.items() if name != "prompt"}
    return kind(prompt=messages, **fields)


def _plain(value: Any) -> Any:
    if isinstance(value, bytes):
        return _text(value)
    return tuple(_text(item) if isinstance(item, bytes) else int(item) for item in value)


def _text(value: bytes) -> str:
    return value.decode("utf-8")

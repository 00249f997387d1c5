"""What goes beside the weights of a published checkpoint: how to sample from it, and where it comes from.

Both functions write into the folder that `huggingface.save` hands to its `extra_files`.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def write_generation_config(
    folder: Path, *, eos_id: int, pad_id: int, bos_id: int | None = None, **sampling: Any
) -> None:
    """`generation_config.json`, which `generate` of transformers takes its defaults from.

    Args:
      folder: of the checkpoint.
      eos_id: ends a completion.
      pad_id: of the tokenizer.
      bos_id: None where the tokenizer has none.
      **sampling: fields of `transformers.GenerationConfig`: `do_sample=True, temperature=0.7, max_new_tokens=64`.
    """
    ids = {"eos_token_id": eos_id, "pad_token_id": pad_id, "bos_token_id": bos_id}
    text = json.dumps({**ids, **sampling}, indent=2) + "\n"
    (folder / "generation_config.json").write_text(text, encoding="utf-8")


def write_model_card(
    folder: Path,
    *,
    title: str,
    about: str,
    data: str,
    seed: int,
    commands: Sequence[str],
    figures: Mapping[str, Any],
    settings: Mapping[str, Any],
    base: str | None = None,
    tags: Sequence[str] = ("rlhf",),
) -> None:
    """`README.md`: what the checkpoint is, the data, the seed, the commands and the figures that they gave.

    Args:
      folder: of the checkpoint.
      title: of the page.
      about: what it is and what it is not for.
      data: what it was trained on.
      seed: of the run.
      commands: that made it, in order.
      figures: name to number or text; nested mappings become dotted names. Who judged belongs among them.
      settings: the run's configuration.
      base: the checkpoint that training started from; None for random weights.
      tags: for search.
    """
    header = ["---", "library_name: transformers", "tags:", *(f"- {json.dumps(tag)}" for tag in tags)]
    if base is not None:
        header.append(f"base_model: {json.dumps(base)}")
    rows = [
        f"| {name} | {value:.4g} |" if isinstance(value, float) else f"| {name} | {value} |"
        for name, value in _flat(figures)
    ]
    lines = [
        *header,
        "---",
        "",
        f"# {title}",
        "",
        about,
        "",
        f"Trained with `rlhf_jax`, starting from {'random weights' if base is None else base}. Data: {data}. Seed: {seed}.",
        "",
        "```",
        *commands,
        "```",
        "",
        *(["| figure | value |", "|---|---|", *rows, ""] if rows else ["No figures were measured.", ""]),
        "Settings:",
        "",
        "```json",
        json.dumps(settings, indent=2, sort_keys=True, default=str),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """`{"kl": {"mean": 1.0}}` → `[("kl.mean", 1.0)]`."""
    found = []
    for name, value in tree.items():
        found += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return found

"""Tokenizers as data: two functions, a few ids, and a fingerprint that every artefact can carry.

Text that spells a special token is plain text: `encode` never returns the pad, bos or eos id, so a user
cannot close a turn by typing its marker. `decode` gives no text for them. `pad_id == eos_id` is legal,
because masks come from lengths. A folder with a chat template gives a tokenizer that writes dialogues with it
(`data.templates`); the template is part of the fingerprint.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_jax.data.templates import ChatTemplate, read_template

NUM_BYTES = 256
PAD_TOKEN, BOS_TOKEN, EOS_TOKEN = "<|pad|>", "<|bos|>", "<|endoftext|>"
"""Special tokens of the tokenizers made here."""

TURN_TOKENS = {"system": "<|turn_system|>", "user": "<|turn_user|>", "assistant": "<|turn_assistant|>"}
"""Role to the special token that opens its turn, in the BPE tokenizers trained here."""

_BYTE_FILE = "byte_tokenizer.json"


@dataclass(frozen=True)
class Tokenizer:
    """Text to ids and back. Two tokenizers are equal when ids and fingerprint are."""

    vocab_size: int
    """Ids are `0 <= id < vocab_size`: rows of an embedding."""
    pad_id: int
    eos_id: int
    """Ends a completion: the eos token, or with a chat template the special token that ends the assistant's turn."""
    bos_id: int | None
    turn_ids: Mapping[str, int]
    """Role to the id that opens its turn; empty where a dialogue's turns are marked by text (`data.chat`)."""
    fingerprint: str
    """sha256, in hex, of the vocabulary, the special ids and the chat template."""
    encode: Callable[[str], list[int]] = field(compare=False, repr=False)
    """Text to ids, special tokens neither added nor recognised."""
    decode: Callable[[Sequence[int]], str] = field(compare=False, repr=False)
    """Ids to text; special ids give none, bad UTF-8 gives U+FFFD. Raises `ValueError` for unknown ids."""
    save: Callable[[Path], None] = field(compare=False, repr=False)
    """Writes the files that `load_tokenizer` reads into an existing folder."""
    template: ChatTemplate | None = field(default=None, compare=False, repr=False)
    """How dialogues are written, where the tokenizer brings a chat template."""


def byte_tokenizer() -> Tokenizer:
    """256 bytes, then pad 256, bos 257, eos 258. Any text goes in and comes back; nothing is learned."""
    pad_id, bos_id, eos_id = NUM_BYTES, NUM_BYTES + 1, NUM_BYTES + 2
    vocabulary = {f"<0x{i:02X}>": i for i in range(NUM_BYTES)}

    def encode(text: str) -> list[int]:
        return list(text.encode("utf-8"))

    def decode(ids: Sequence[int]) -> str:
        ids = _checked(ids, NUM_BYTES + 3)
        return bytes(i for i in ids if i < NUM_BYTES).decode("utf-8", errors="replace")

    def save(directory: Path) -> None:
        (directory / _BYTE_FILE).write_text(json.dumps({"kind": "bytes", "vocab_size": NUM_BYTES + 3}) + "\n")

    return Tokenizer(
        vocab_size=NUM_BYTES + 3,
        pad_id=pad_id,
        eos_id=eos_id,
        bos_id=bos_id,
        turn_ids={},
        fingerprint=_fingerprint(vocabulary, pad_id, eos_id, bos_id),
        encode=encode,
        decode=decode,
        save=save,
    )


def train_bpe(texts: Iterable[str], *, vocab_size: int) -> Tokenizer:
    """Trains a byte-level BPE tokenizer of at most `vocab_size` ids: fewer where `texts` offer no more.

    Ids 0, 1, 2 are pad, bos, eos; then one to open the turn of each role, the 256 bytes, so that any text can be
    encoded, and merges. Raises `ValueError` when `vocab_size` has no room for the first 262.
    """
    special_tokens = [PAD_TOKEN, BOS_TOKEN, EOS_TOKEN, *TURN_TOKENS.values()]
    smallest = NUM_BYTES + len(special_tokens)
    if vocab_size < smallest:
        raise ValueError(f"vocab_size {vocab_size} < {smallest} (256 bytes, pad, bos, eos, 3 turns); fix: raise it")
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special_tokens,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    names = {"pad_token": PAD_TOKEN, "bos_token": BOS_TOKEN, "eos_token": EOS_TOKEN}
    return _wrap_backend(backend, **names, extra_special_tokens=list(TURN_TOKENS.values()))


def load_tokenizer(directory: str | Path, *, template: bool = True) -> Tokenizer:
    """Loads a tokenizer from local files: no network, no remote code.

    Takes what `save_tokenizer` wrote, any folder that `transformers.AutoTokenizer` reads, or GPT-2's
    `encoder.json` + `vocab.bpe`. Without a pad token, `pad_id` is `eos_id`. A chat template in the folder is used, and
    names `eos_id`; `template=False` leaves it out, also of what is saved. Raises `ValueError` when the folder holds no
    tokenizer, when there is no eos token, when typed special tokens cannot be kept plain, or for the reasons that
    `templates.read_template` gives.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise ValueError(f"{directory}: no such folder; fix: give the folder that holds the tokenizer's files")
    names = {path.name for path in directory.iterdir()}
    if _BYTE_FILE in names:
        return byte_tokenizer()
    if {"encoder.json", "vocab.bpe"} <= names and "tokenizer.json" not in names:
        return _load_gpt2(directory)
    if "tokenizer_config.json" not in names and "tokenizer.json" not in names:
        raise ValueError(
            f"{directory}: holds no tokenizer (found: {', '.join(sorted(names)) or 'nothing'}); "
            "fix: give a folder with tokenizer.json and tokenizer_config.json, or encoder.json and vocab.bpe"
        )
    from transformers import AutoTokenizer

    source = AutoTokenizer.from_pretrained(
        str(directory), local_files_only=True, trust_remote_code=False, split_special_tokens=True
    )
    if not template:
        source.chat_template = None
    return _wrap(source)


def save_tokenizer(tokenizer: Tokenizer, directory: str | Path) -> None:
    """Writes the tokenizer's files into `directory`; `load_tokenizer` gives it back. A new directory is there whole or not."""
    directory = Path(directory)
    if directory.exists():
        tokenizer.save(directory)
        return
    partial = directory.with_name(f"{directory.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tokenizer.save(partial)
    os.replace(partial, directory)


def _load_gpt2(directory: Path) -> Tokenizer:
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers

    backend = Backend(models.BPE.from_file(str(directory / "encoder.json"), str(directory / "vocab.bpe")))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return _wrap_backend(backend, bos_token=EOS_TOKEN, eos_token=EOS_TOKEN)


def _wrap_backend(backend: Any, **special_tokens: str | list[str]) -> Tokenizer:
    from transformers import PreTrainedTokenizerFast

    return _wrap(
        PreTrainedTokenizerFast(
            tokenizer_object=backend,
            split_special_tokens=True,
            clean_up_tokenization_spaces=False,
            **special_tokens,
        )
    )


def _wrap(source: Any) -> Tokenizer:
    """A `transformers` tokenizer as a `Tokenizer`."""
    vocabulary = source.get_vocab()
    vocab_size = max(vocabulary.values()) + 1

    def encode(text: str) -> list[int]:
        return list(source(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def decode(ids: Sequence[int], *, after: Sequence[int] = ()) -> str:
        ids = [*after, *_checked(ids, vocab_size)]
        return source.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def save(directory: Path) -> None:
        source.save_pretrained(str(directory))

    template = read_template(source, decode=decode) if source.chat_template else None
    eos_id = template.end_id if template else source.eos_token_id
    if eos_id is None:
        raise ValueError(
            f"{source.name_or_path}: the tokenizer has no eos token, so a reply could never end; "
            'fix: add "eos_token" to tokenizer_config.json'
        )
    pad_id = eos_id if source.pad_token_id is None else source.pad_token_id
    has_turns = template is None and set(TURN_TOKENS.values()) <= set(source.all_special_tokens)
    _check_specials_stay_plain(encode, source.all_special_tokens, source.all_special_ids)
    return Tokenizer(
        vocab_size=vocab_size,
        pad_id=pad_id,
        eos_id=eos_id,
        bos_id=source.bos_token_id,
        turn_ids={role: vocabulary[token] for role, token in TURN_TOKENS.items()} if has_turns else {},
        fingerprint=_fingerprint(vocabulary, pad_id, eos_id, source.bos_token_id, template.text if template else None),
        encode=encode,
        decode=decode,
        save=save,
        template=template,
    )


def _check_specials_stay_plain(encode: Callable[[str], list[int]], tokens: Sequence[str], ids: Sequence[int]) -> None:
    for token in tokens:
        if set(encode(f"a{token}b")) & set(ids):
            raise ValueError(
                f"text that spells the special token {token!r} encodes to its id, so users could type it; "
                "fix: use the fast version of this tokenizer (tokenizer.json)"
            )


def _checked(ids: Sequence[int], vocab_size: int) -> list[int]:
    ids = [int(i) for i in ids]
    for place, i in enumerate(ids):
        if not 0 <= i < vocab_size:
            raise ValueError(
                f"token id {i} at place {place} is outside the vocabulary of {vocab_size}; "
                "fix: decode with the tokenizer that the model was trained with"
            )
    return ids


def _fingerprint(
    vocabulary: Mapping[str, int], pad_id: int, eos_id: int, bos_id: int | None, template: str | None = None
) -> str:
    content = {"vocabulary": dict(vocabulary), "pad": pad_id, "eos": eos_id, "bos": bos_id}
    content |= {} if template is None else {"template": template}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

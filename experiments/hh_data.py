"""Human comparisons for the HH job: two files, split by prompt, cut to the first tokens of the last turn's reply.

The cut is the study's own choice: how a reply begins carries much of its manner, and a network of this size learns it
in minutes. The policies learn and sample beginnings of one fixed length, without an end: where replies may end, ending
early is the cheapest way to a reward model's favour, and style does not move. What was cut is counted and printed.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from hh_config import HHConfig

from rlhf_jax.data import chat
from rlhf_jax.data.batching import packed_demonstration_batch, prompt_batch, ranking_batch, split_by_prompt
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.lengths import fit_prompts, truncate_left
from rlhf_jax.data.preferences import read_preferences
from rlhf_jax.data.records import Preference, TokenizedDemonstration, TokenizedRanking
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from rlhf_jax.types import PromptBatch, RankingBatch, SequenceBatch

DOMAINS = ("helpful", "harmless")
PARTS = ("a", "b", "held_out")
"""Half A trains the reward models, half B the judges; act 1 sees the chosen replies of both."""


@dataclasses.dataclass(frozen=True)
class HHData:
    """The comparisons by domain and part, with the tokenizer trained on the text of halves A and B."""

    pairs: dict[str, dict[str, list[Preference]]]
    tokenizer: Tokenizer

    def of(self, *parts: str, domains: Sequence[str] = DOMAINS) -> list[Preference]:
        """All pairs of some parts and domains, in a fixed order."""
        return [pair for domain in domains for part in parts for pair in self.pairs[domain][part]]


def read_pairs(data_dir: Path | None) -> dict[str, list[Preference]]:
    """Both files, with the last human turn as the whole prompt; exits with one message when they cannot be used."""
    if data_dir is None:
        raise SystemExit(_missing("no data folder was given"))
    paths = {domain: Path(data_dir) / "preferences" / f"hh_{domain}_base.jsonl.gz" for domain in DOMAINS}
    absent = [str(path) for path in paths.values() if not path.is_file()]
    if absent:
        raise SystemExit(_missing(f"no such file: {', '.join(absent)}"))
    pairs = {}
    for domain, path in paths.items():
        try:
            records, report = read_preferences(path)
        except DataError as error:
            raise SystemExit(str(error)) from error
        print(f"{path}: {report}")
        pairs[domain] = [dataclasses.replace(record, prompt=record.prompt[-1:]) for record in records]
    return pairs


def split(config: HHConfig, pairs: dict[str, list[Preference]], *, seed: int) -> dict[str, dict[str, list[Preference]]]:
    """Held-out prompts, and halves A and B of the others; equal last turns stay together, across domains too."""
    parts = {}
    for domain in DOMAINS:
        train, held_out = split_by_prompt(pairs[domain], fraction=config.held_out_fraction, seed=seed)
        half_a, half_b = split_by_prompt(train, fraction=0.5, seed=seed + 1_000_003)
        parts[domain] = {"a": half_a, "b": half_b, "held_out": held_out}
    return parts


def load(config: HHConfig, pairs: dict[str, list[Preference]], run: Path, *, model: Path | None, seed: int) -> HHData:
    """Split, and the tokenizer in the folder `model`, or one trained once on what is not held out."""
    parts = split(config, pairs, seed=seed)
    if not (run / "tokenizer").exists():
        if model is None:
            train = [pair for domain in DOMAINS for part in ("a", "b") for pair in parts[domain][part]]
            texts = [f"{pair.prompt[0].content}\n{reply}" for pair in train for reply in (pair.chosen, pair.rejected)]
            tokenizer = train_bpe(texts, vocab_size=config.vocab_size)
        else:
            tokenizer = load_tokenizer(model, template=False)
        save_tokenizer(tokenizer, run / "tokenizer")
    return HHData(parts, load_tokenizer(run / "tokenizer"))


def encode_turns(config: HHConfig, tokenizer: Tokenizer, pairs: Sequence[Preference]) -> list[tuple[int, ...]]:
    """The end of each human turn, then bos (or eos, where there is no bos) as the border to the reply."""
    border = tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id
    turns = [(*tokenizer.encode(pair.prompt[0].content), border) for pair in pairs]
    return fit_prompts(turns, length=config.prompt_length, overlong=truncate_left)[0]


def encode_replies(tokenizer: Tokenizer, pair: Preference, length: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The first `length` tokens of the chosen and of the rejected reply."""
    chosen, rejected = (chat.encode_completion(tokenizer, reply)[:length] for reply in (pair.chosen, pair.rejected))
    return chosen, rejected


def prompt_rows(config: HHConfig, data: HHData, pairs: Sequence[Preference]) -> PromptBatch:
    """Left-padded prompts to answer, each distinct one once."""
    tokenizer, distinct = data.tokenizer, unique_prompts(pairs)
    turns = encode_turns(config, tokenizer, distinct)
    return prompt_batch(turns, length=config.prompt_length, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)


def unique_prompts(pairs: Sequence[Preference]) -> list[Preference]:
    """The first pair of each distinct last turn."""
    return list({pair.prompt[0].content: pair for pair in reversed(pairs)}.values())[::-1]


def demonstration_rows(
    config: HHConfig, data: HHData, pairs: Sequence[Preference], *, replies_per_row: int = 2
) -> SequenceBatch:
    """Beginnings of chosen replies to imitate; a row has room for so many of the longest."""
    tokenizer = data.tokenizer
    turns = encode_turns(config, tokenizer, pairs)
    examples = [
        TokenizedDemonstration(turn, tuple(tokenizer.encode(" " + pair.chosen)[: config.reply_length]))
        for turn, pair in zip(turns, pairs, strict=True)
    ]
    return packed_demonstration_batch(
        examples,
        length=replies_per_row * (config.prompt_length + config.reply_length),
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )


def ranking_rows(config: HHConfig, data: HHData, pairs: Sequence[Preference], *, length: int) -> RankingBatch:
    """Pairs as rankings of two: the first `length` tokens, the end of sequence included."""
    tokenizer = data.tokenizer
    turns = encode_turns(config, tokenizer, pairs)
    examples = [
        TokenizedRanking(turn, encode_replies(tokenizer, pair, length), (0, 1))
        for turn, pair in zip(turns, pairs, strict=True)
    ]
    return _ranking_batch(config, tokenizer, examples, length)


def cut_alike(config: HHConfig, tokenizer: Tokenizer, pair: Preference) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Both replies cut to the shorter one's length, `reply_length` at most, without an end: length tells nothing."""
    chosen, rejected = (tokenizer.encode(" " + reply) for reply in (pair.chosen, pair.rejected))
    size = min(len(chosen), len(rejected), config.reply_length)
    return tuple(chosen[:size]), tuple(rejected[:size])


def differing(config: HHConfig, data: HHData, pairs: Sequence[Preference]) -> list[Preference]:
    """The pairs whose two replies still differ when they are cut alike: those from which a model can learn."""
    return [pair for pair in pairs if len(set(cut_alike(config, data.tokenizer, pair))) == 2]


def matched_rows(config: HHConfig, data: HHData, pairs: Sequence[Preference]) -> RankingBatch:
    """Pairs cut alike, as rankings of two."""
    tokenizer = data.tokenizer
    examples = [
        TokenizedRanking(turn, cut_alike(config, tokenizer, pair), (0, 1))
        for turn, pair in zip(encode_turns(config, tokenizer, pairs), pairs, strict=True)
    ]
    return _ranking_batch(config, tokenizer, examples, config.reply_length)


def _ranking_batch(
    config: HHConfig, tokenizer: Tokenizer, examples: Sequence[TokenizedRanking], length: int
) -> RankingBatch:
    return ranking_batch(
        examples,
        length=config.prompt_length + length,
        num_responses=2,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )


def full_lengths(data: HHData, pairs: Sequence[Preference]) -> np.ndarray:
    """Tokens of the uncut replies, `[N, 2]`: chosen, rejected."""
    encode = data.tokenizer.encode
    return np.array([[len(encode(" " + reply)) for reply in (pair.chosen, pair.rejected)] for pair in pairs])


def counts(config: HHConfig, data: HHData) -> dict[str, int]:
    """What the study's lengths cut."""
    pairs = data.of(*PARTS)
    turns = [len(data.tokenizer.encode(pair.prompt[0].content)) + 1 for pair in pairs]
    lengths = full_lengths(data, pairs)
    return {
        "pairs": len(pairs),
        **{f"{domain}_{part}": len(data.pairs[domain][part]) for domain in DOMAINS for part in PARTS},
        "prompts_cut": int(np.sum(np.array(turns) > config.prompt_length)),
        "replies": int(lengths.size),
        "replies_cut": int(np.sum(lengths > config.reply_length)),
        "identical_after_cut": len(pairs) - len(differing(config, data, pairs)),
        "long_length": config.long_length,
        "fixed_length": config.fixed_length,
    }


def _missing(what: str) -> str:
    return (
        f"human comparisons: {what}; nothing was started. Needed are preferences/hh_helpful_base.jsonl.gz and "
        "preferences/hh_harmless_base.jsonl.gz of a data folder. Fix: give the folder with --data-dir DIRECTORY or in "
        "the environment variable RLHF_JAX_DATA; or, in rlhf.py, leave --dataset hh away for the embedded world, whose "
        "data are synthetic"
    )

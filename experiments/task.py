"""What the scripts of this folder train on: the embedded world, or files in the clean schema given by `--data`."""

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
from meshes import COPIES, MeshConfig, mesh_of

from rlhf_jax.data import chat, synthetic
from rlhf_jax.data.batching import packed_demonstration_batch, prompt_batch, ranking_batch, split_by_prompt
from rlhf_jax.data.demonstrations import read_demonstrations
from rlhf_jax.data.json_lines import read_json_lines
from rlhf_jax.data.lengths import fit_demonstrations, fit_prompts, fit_rankings, truncate_left
from rlhf_jax.data.preferences import preference_ranking, read_preferences, read_rankings
from rlhf_jax.data.prompts import read_prompts
from rlhf_jax.data.records import DataReport, Demonstration, Message, Prompt, Ranking
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer, train_bpe
from rlhf_jax.objectives import SharedPrompts, shared_sizes
from rlhf_jax.runtime.processes import Processes, is_first, meet
from rlhf_jax.runtime.profile import profiled
from rlhf_jax.runtime.resume import Kept, resumable
from rlhf_jax.runtime.sharding import COLUMN_AXIS
from rlhf_jax.types import PromptBatch, RankingBatch, SequenceBatch

NUM_DEMONSTRATIONS, NUM_RANKINGS, NUM_PROMPTS, NUM_HELD_OUT = 16_000, 4_096, 8_192, 512
HELD_OUT_FRACTION = 0.1


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Where the text comes from and how long it may be."""

    run: Path = Path("runs/rlhf")
    """Folder of the run; one that exists is never overwritten."""
    resume: bool = False
    """Continue in `run`: acts that are finished are not played again, an unfinished one goes on after its last checkpoint."""
    force: bool = False
    """With `resume`: go on although settings or data differ; the run's folder records what did."""
    replay: Path | None = None
    """With `resume`: a `bad_batch_N.npz` of this run. Play that step again, say what is not finite, and stop."""
    profile: bool = False
    """Write a trace of three steps of each act into `run/profile`."""
    processes: Processes = Processes()
    """Of this run, where there are several."""
    mesh: MeshConfig = COPIES
    """Of the devices of all processes."""
    seed: int = 0
    data: Path | None = None
    """JSON lines in the clean schema; none = the embedded world."""
    model: Path | None = None
    """Hugging Face folder of weights and tokenizer to start from; none = random weights, and a tokenizer made here."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What is computed in; parameters stay float32."""
    logits_chunk: int | None = None
    """Tokens whose logits exist at a time in losses and scoring, for large vocabularies; none = all. Act 1's, kept with it."""
    vocab_size: int = 1024
    """Of the tokenizer made here."""
    prompt_length: int = 16
    """Tokens; longer prompts lose their beginning."""
    response_length: int = 19
    """Tokens, the end of sequence included; longer demonstrations are dropped."""
    row_length: int = 64
    """Tokens of a training row of act 1, which packs several demonstrations."""


def keeper(config: TaskConfig) -> Callable[..., contextlib.AbstractContextManager[Kept]]:
    """`keep(stage, state, save_every=..., facts=...)` for the training loops: `resumable` in the folder of this run."""

    @contextlib.contextmanager
    def keep(stage: str, state: Any, **options: Any) -> Iterator[Kept]:
        options |= {"force": config.force, "replay": config.replay}
        traced = partial(profiled, folder=config.run / "profile" / stage) if config.profile else contextlib.nullcontext
        with resumable(config.run, stage, state, **options) as kept, traced(kept) as seen:
            yield seen

    return keep


def load_demonstrations(config: TaskConfig, run: Path) -> tuple[Tokenizer, list[Demonstration], list[Demonstration]]:
    """Tokenizer (the model's, or trained on the text; kept in `run/tokenizer`), training and held-out demonstrations."""
    if config.data is None:
        train = world_demonstrations(synthetic.demonstrations(config.seed, NUM_DEMONSTRATIONS))
        rng = np.random.default_rng([config.seed, 1])
        prompts = synthetic.sample_prompts(config.seed + 1, NUM_HELD_OUT, heldout=True)
        held_out = world_demonstrations([(prompt, synthetic.respond(rng, prompt)) for prompt in prompts])
    else:
        records, report = read_demonstrations(config.data)
        print(f"{config.data}: {report}")
        train, held_out = split_by_prompt(records, fraction=HELD_OUT_FRACTION, seed=config.seed)
    if not (run / "tokenizer").exists():
        if config.model is None:
            texts = [chat.render(record.prompt) + " " + record.response for record in train]
            tokenizer = train_bpe(texts, vocab_size=config.vocab_size)
        else:
            tokenizer = load_tokenizer(config.model)
        if is_first():
            save_tokenizer(tokenizer, run / "tokenizer")
    meet("tokenizer")
    return load_tokenizer(run / "tokenizer"), train, held_out


def load_rankings(config: TaskConfig) -> tuple[list[Ranking], list[Ranking]]:
    """Training and held-out rankings of the file `--data`; pairs count as rankings of two."""
    if config.data is None:
        raise ValueError("load_rankings reads a file: in the embedded world, sample responses and have them ranked")
    _, first = next(iter(read_json_lines(config.data)))
    records, report = (read_preferences if "chosen" in first else read_rankings)(config.data)
    print(f"{config.data}: {report}")
    rankings = [record if isinstance(record, Ranking) else preference_ranking(record) for record in records]
    return split_by_prompt(rankings, fraction=HELD_OUT_FRACTION, seed=config.seed)


def load_prompts(config: TaskConfig) -> tuple[list[Prompt], list[Prompt]]:
    """Training and held-out prompts."""
    if config.data is None:
        train = synthetic.sample_prompts(config.seed + 2, NUM_PROMPTS)
        return world_prompts(train), world_prompts(held_out_questions(config))
    records, report = read_prompts(config.data)
    print(f"{config.data}: {report}")
    return split_by_prompt(records, fraction=HELD_OUT_FRACTION, seed=config.seed)


def held_out_questions(config: TaskConfig) -> list[str]:
    """The world's prompts on which everything is judged: distinct, none seen in training, each kind with its own share."""
    rng = np.random.default_rng([config.seed, 3])
    chosen = []
    for kind, share in synthetic.KIND_SHARES.items():
        pool = [p for p in synthetic.all_prompts() if synthetic.is_heldout(p) and synthetic.question_of(p).kind == kind]
        wanted = round(share * NUM_HELD_OUT)
        if wanted > len(pool):
            raise ValueError(f"{wanted} held-out prompts of kind {kind} are wanted, the world has {len(pool)}")
        chosen += rng.permutation(pool)[:wanted].tolist()
    return rng.permutation(chosen).tolist()


def world_demonstrations(pairs: Sequence[tuple[str, str]]) -> list[Demonstration]:
    """The world's (prompt, response) strings as records."""
    return [Demonstration(str(i), (Message("user", p),), response) for i, (p, response) in enumerate(pairs)]


def world_prompts(questions: Sequence[str]) -> list[Prompt]:
    """The world's prompt strings as records."""
    return [Prompt(str(i), (Message("user", question),)) for i, question in enumerate(questions)]


def world_rankings(questions: Sequence[str], responses: Sequence[Sequence[str]], *, seed: int) -> list[Ranking]:
    """K responses to each question, ranked by a random annotator of the world's panel."""
    ranked = synthetic.annotate(seed, list(zip(questions, responses, strict=True)))
    return [
        Ranking(str(i), (Message("user", question),), tuple(texts), ranks)
        for i, (question, texts, (_, ranks)) in enumerate(zip(questions, responses, ranked, strict=True))
    ]


def response_pairs(rankings: Sequence[Ranking]) -> list[tuple[str, str, str]]:
    """(prompt, a, b) for every two different responses of the world's rankings."""
    return [
        (record.prompt[0].content, a, b)
        for record in rankings
        for a, b in itertools.combinations(record.responses, 2)
        if a != b
    ]


def demonstration_rows(config: TaskConfig, tokenizer: Tokenizer, records: Sequence[Demonstration]) -> SequenceBatch:
    """Packed token rows; what does not fit is dropped and said."""
    examples = [chat.encode_demonstration(tokenizer, record) for record in records]
    examples, report = fit_demonstrations(
        examples, length=min(config.row_length, config.prompt_length + config.response_length), overlong=truncate_left
    )
    _say(report, "demonstrations")
    return packed_demonstration_batch(
        examples, length=config.row_length, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size
    )


def ranking_rows(
    config: TaskConfig, tokenizer: Tokenizer, records: Sequence[Ranking], *, num_responses: int
) -> RankingBatch:
    """One element per prompt, all its responses in it; rows as long as the longest needs, and the sequence axis shares."""
    limit = config.prompt_length + config.response_length + 1
    examples = [chat.encode_ranking(tokenizer, record) for record in records]
    examples, report = fit_rankings(examples, length=limit, overlong=truncate_left)
    _say(report, "rankings")
    length = max(len(prompt) + max(map(len, responses)) for prompt, responses, _ in examples)
    length += -length % mesh_of(config.mesh).shape[COLUMN_AXIS]
    return ranking_batch(
        examples,
        length=length,
        num_responses=num_responses,
        pad_id=tokenizer.pad_id,
        vocab_size=tokenizer.vocab_size,
    )


def shared_prompts(config, data) -> SharedPrompts | None:
    """Columns of the longest prompt and response of `data`, where the act's `config` shares prompts."""
    return shared_sizes(data.tokens, data.segment_ids, data.completion_mask) if config.share_prompts else None


def prompt_rows(config: TaskConfig, tokenizer: Tokenizer, records: Sequence[Prompt]) -> PromptBatch:
    """Left-padded prompts."""
    prompts, report = fit_prompts(
        chat.encode_prompts(tokenizer, records), length=config.prompt_length, overlong=truncate_left
    )
    _say(report, "prompts")
    return prompt_batch(prompts, length=config.prompt_length, pad_id=tokenizer.pad_id, vocab_size=tokenizer.vocab_size)


def _say(report: DataReport, what: str) -> None:
    """Print what the length limits did; nothing left is an error."""
    if not report.kept:
        raise ValueError(f"{what}: {report}; nothing is left to train on: raise prompt_length or response_length")
    if report.kept < report.read or report.truncated_prompts:
        print(f"{what}: {report}")

"""The tension between helpful and harmless, on real human comparisons (Bai et al. 2022, §5.1.1).

    python experiments/hh_tension.py --data-dir DIRECTORY

Claim: a reward model of one kind of comparison is worse than chance on the other. Reads preferences/hh_*_base.jsonl.gz of
a data folder (1,880 + 1,899 pairs of the public test splits), trains small networks from scratch on the last human turn
and the beginning of the reply, and scores every pair of both domains. Five seeds are five folds by prompt, so that every
in-domain pair is scored by the one network that did not see it; all networks train in one `vmap`. At this size the
tension is mostly length: helpful comparisons favour the longer reply, harmless ones the shorter. Hence two tables: replies
of up to 48 tokens, and replies cut to exactly 12, where length cannot be seen. Deviation: tokenizer trained on all text (no
labels in it).

Measured: helpful .576 and harmless .564 on their own kind, .438 and .443 on the other's, shuffled labels .508; prefer the
longer .609 and .444; at 12 tokens these are .490 and .489. All three criteria pass. 365 s on two cores of an AMD EPYC
beside other work (321 s of CPU time).
"""

import dataclasses
import os
import time
from functools import partial
from pathlib import Path

import hh_data
import jax
import numpy as np
import tyro
from hh_config import HHConfig
from scoring import in_parts

from rlhf_jax.data.batching import batch_indices, split_by_prompt
from rlhf_jax.data.records import Preference
from rlhf_jax.data.tokenizers import train_bpe
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import ensemble_scores, init_reward_head
from rlhf_jax.objectives import reward_model
from rlhf_jax.training.ensembles import init_ensemble, make_ensemble_step
from rlhf_jax.training.evaluate import Interval, mean_interval, proportion_interval
from rlhf_jax.training.optimizers import adam_optimizer, warmup_cosine
from rlhf_jax.training.train_step import make_train_step
from rlhf_jax.types import RankingBatch

DOMAINS = hh_data.DOMAINS


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of the study."""

    data_dir: Path | None = Path(os.environ["RLHF_JAX_DATA"]) if "RLHF_JAX_DATA" in os.environ else None
    num_folds: int = 5
    num_shuffled: int = 8
    lengths: tuple[int, int] = (48, 12)
    """Tokens of the reply: at most the first, then exactly the second."""
    prompt_length: int = 8
    vocab_size: int = 1024
    model_dim: int = 64
    num_layers: int = 1
    batch_size: int = 16
    num_epochs: float = 1.0
    """Of one domain's training folds; the joint networks take as many steps."""
    learning_rate: float = 1e-3


@dataclasses.dataclass(frozen=True)
class Member:
    """One reward model: what it learned from, and which fold it did not see."""

    kind: str
    domains: tuple[str, ...]
    fold: int


def members(config: Config) -> list[Member]:
    """Each fold's helpful, harmless and joint network, then those with shuffled labels."""
    kinds = [("helpful", DOMAINS[:1]), ("harmless", DOMAINS[1:]), ("joint", DOMAINS)]
    trained = [Member(kind, domains, fold) for kind, domains in kinds for fold in range(config.num_folds)]
    return trained + [Member("shuffled", (DOMAINS[i % 2],), i % config.num_folds) for i in range(config.num_shuffled)]


def folds(config: Config, pairs: list[Preference]) -> np.ndarray:
    """The fold of every pair, equal prompts in the same one."""
    found, rest = {}, pairs
    for fold in range(config.num_folds - 1):
        rest, held_out = split_by_prompt(rest, fraction=1 / (config.num_folds - fold), seed=fold)
        found |= {pair.id: fold for pair in held_out}
    return np.array([found.get(pair.id, config.num_folds - 1) for pair in pairs])


def train(config: Config, network: TransformerConfig, rows: RankingBatch, fold: np.ndarray, domain: np.ndarray):
    """All members' params, stacked. Labels are flipped by a coin for the shuffled ones: row n + N is row n flipped."""
    team, num_pairs = members(config), len(fold)
    data = jax.tree.map(lambda x: np.concatenate([x, x]), rows)
    data = data.replace(ranks=np.concatenate([rows.ranks, 1 - rows.ranks]))
    seen = [np.flatnonzero((fold != m.fold) & np.isin(domain, m.domains)) for m in team]
    for i, member in enumerate(team):
        if member.kind == "shuffled":
            seen[i] = seen[i] + num_pairs * np.random.default_rng(i).integers(0, 2, len(seen[i]))
    num_steps = int(config.num_epochs * min(map(len, seen)) // config.batch_size)
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    step = make_ensemble_step(make_train_step(reward_model(transformer.causal_model(network)), optimizer))
    step = jax.jit(step, donate_argnums=0)

    def init(key: jax.Array):
        trunk_key, head_key = jax.random.split(key)
        return {"trunk": transformer.init(trunk_key, network), "head": init_reward_head(head_key, network.model_dim)}

    states, data = init_ensemble(init, jax.random.key(0), optimizer, num_members=len(team)), jax.device_put(data)
    for i in range(num_steps):
        chosen = [
            ids[batch_indices(m, i, num_examples=len(ids), batch_size=config.batch_size)] for m, ids in enumerate(seen)
        ]
        states, metrics = step(states, data, np.stack(chosen))
        if i % 20 == 0 or i == num_steps - 1:
            print(f"step {i + 1}/{num_steps}: mean loss {float(metrics['rm/loss'].mean()):.3f}", flush=True)
    return states.params


def verdicts(network: TransformerConfig, params, rows: RankingBatch) -> np.ndarray:
    """Whether each member prefers the chosen reply, `[N, M]`; equal scores count one half."""
    scores = jax.jit(lambda params, *inputs: ensemble_scores(transformer.causal_model(network), params, *inputs).T)
    rows_of_tokens = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segment_ids))
    flat = in_parts(partial(scores, params), *rows_of_tokens)
    found = flat.reshape(len(rows.tokens), 2, -1)
    gaps = found[:, 0] - found[:, 1]
    return (gaps > 0) + 0.5 * (gaps == 0)


def cell(config: Config, right: np.ndarray, kind: str, on: np.ndarray, fold: np.ndarray, *, held_out: bool):
    """Accuracy of one kind on the pairs `on`: over pairs (each the mean of the seeds that may judge it), and over seeds."""
    team = members(config)
    mine = [i for i, member in enumerate(team) if member.kind == kind]
    judged = np.stack([on & (fold == team[i].fold) if held_out else on for i in mine], axis=1)
    verdict = right[:, mine]
    any_judge = judged.any(axis=1)
    by_pair = np.where(judged, verdict, 0).sum(axis=1)[any_judge] / judged.sum(axis=1)[any_judge]
    by_seed = [verdict[judged[:, j], j].mean() for j in range(len(mine))]
    return proportion_interval(by_pair), mean_interval(np.array(by_seed))


def table(config: Config, right: np.ndarray, fold: np.ndarray, domain: np.ndarray, sizes: np.ndarray) -> dict:
    """Print accuracies, kinds down and pairs across; the intervals over pairs and over seeds."""
    cells = {}
    for kind in ("helpful", "harmless", "joint", "shuffled"):
        for on in DOMAINS:
            cross = kind in DOMAINS and kind != on
            cells[kind, on] = cell(config, right, kind, domain == on, fold, held_out=not cross)
            pairs, seeds = cells[kind, on]
            where = "all pairs" if cross else "held out "
            print(f"{kind:9} on {on:9} {where} {pairs} (n {pairs.n}); over {seeds.n} models {seeds}")
    longer = (sizes[:, 0] > sizes[:, 1]) + 0.5 * (sizes[:, 0] == sizes[:, 1])
    for on in DOMAINS:
        cells["length", on] = proportion_interval(longer[domain == on]), None
        print(f"prefer the longer whole reply on {on}: {cells['length', on][0]}")
    return cells


def both(interval: tuple[Interval, Interval], side: str) -> bool:
    """Whether the intervals over pairs and over seeds both lie above, or below, one half."""
    return all(x.low > 0.5 if side == "above" else x.high < 0.5 for x in interval)


def main(config: Config) -> dict[str, bool]:
    """Both tables, and which criteria hold."""
    if config.data_dir is None:
        raise SystemExit("no data folder; nothing was started; fix: --data-dir DIRECTORY or RLHF_JAX_DATA")
    start, pairs = time.monotonic(), hh_data.read_pairs(config.data_dir)
    tokenizer = train_bpe(
        [f"{p.prompt[0].content}\n{p.chosen}\n{p.rejected}" for d in DOMAINS for p in pairs[d]],
        vocab_size=config.vocab_size,
    )
    study = HHConfig(prompt_length=config.prompt_length, vocab_size=config.vocab_size)
    data = hh_data.HHData({d: {"all": pairs[d]} for d in DOMAINS}, tokenizer)
    everything = data.of("all")
    domain = np.repeat(DOMAINS, [len(pairs[d]) for d in DOMAINS])
    fold = np.concatenate([folds(config, pairs[d]) for d in DOMAINS])
    sizes = hh_data.full_lengths(data, everything)
    network = TransformerConfig(
        vocab_size=tokenizer.vocab_size,
        num_layers=config.num_layers,
        model_dim=config.model_dim,
        head_dim=config.model_dim // 4,
        mlp_dim=2 * config.model_dim,
    )
    tables = []
    for length, exactly in zip(config.lengths, (False, True), strict=True):
        rows = hh_data.ranking_rows(study, data, everything, length=length)
        differs = (rows.tokens[:, 0] != rows.tokens[:, 1]).any(axis=1)
        keep = np.flatnonzero(differs & ((sizes >= length).all(axis=1) | (not exactly)))
        rows = jax.tree.map(partial(np.take, indices=keep, axis=0), rows)
        print(f"\nreplies of {'exactly' if exactly else 'at most'} {length} tokens: {len(keep)} of {len(sizes)} pairs")
        params = train(config, network, rows, fold[keep], domain[keep])
        tables.append(table(config, verdicts(network, params, rows), fold[keep], domain[keep], sizes[keep]))
    full, fixed = tables
    null = np.mean([full["shuffled", on][1].mean for on in DOMAINS])
    passed = {
        "in-domain accuracies above 1/2": all(both(full[d, d], "above") for d in DOMAINS),
        "cross accuracies below 1/2": all(both(full[d, o], "below") for d, o in (DOMAINS, DOMAINS[::-1])),
        f"shuffled labels at 1/2 within 0.02 ({null:.3f})": bool(abs(null - 0.5) <= 0.02),
    }
    print(*(f"{'pass' if ok else 'FAIL'}: {what}" for what, ok in passed.items()), sep="\n")
    crosses = {f"{d} on {o}": str(fixed[d, o][0]) for d, o in (DOMAINS, DOMAINS[::-1])}
    print(f"at a fixed length, where only wording is left: {crosses}; {time.monotonic() - start:.0f} s")
    return passed


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

"""The main job on real human comparisons (Bai et al. 2022): helpful against harmless, as a study of style.

    python experiments/rlhf.py --dataset hh --data-dir DIRECTORY --run runs/hh      # about ten minutes on two CPU cores
    python experiments/hh_report.py runs/hh                                         # computes every figure anew
    python experiments/hh_report.py runs/hh0 runs/hh1 runs/hh2                      # the criteria of several seeds

(1) supervised fine-tuning on chosen replies, (2) a helpful and a harmless reward model on half of the comparisons,
and two judges on the other half, (3) PPO towards `w z(helpful) + (1 - w) z(harmless)` until the KL target is reached,
and what must hold or fail beside it: PPO-ptx, a stiff leash, reward models that learned shuffled labels. Deviations
from the paper: a network of 0.4 million parameters from random weights, reward models that are heads on its averaged
features, the last human turn as prompt, the first tokens of the reply. The numbers are in `hh_config.py`, the data in
`hh_data.py`, acts 2 and 3 in `hh_rewards.py` and `hh_rl.py`, what is said about them in `hh_report.py`.
"""

import dataclasses
from collections.abc import Sequence
from functools import partial

import hh_data
import hh_render
import hh_report
import hh_rewards
import hh_rl
import jax
import kept_reward
import numpy as np
import sampling
import sft
from acts import note_command, timed
from hh_config import HHConfig, Job
from hh_data import DOMAINS, HHData
from hh_markers import has_marker
from hh_rl import RLRun
from rich.console import Console
from rich.markdown import Markdown
from scoring import row_logprobs, row_sums, score_rows

from rlhf_jax.data.records import Preference
from rlhf_jax.models import transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import open_run, write_json_lines
from rlhf_jax.types import Params, RankingBatch

JUDGES = {domain: f"judge_{domain}" for domain in DOMAINS}
COUPLED = ("sft", "kl_coef_1e3")
"""Sampled with the same noise: what differs between them is what training did."""


def play_sft(job: Job, data: HHData) -> None:
    """Act 1, on the chosen replies of both halves of both domains."""
    policy = sft.start(job.hh.sft, data.tokenizer, model=job.model, seed=job.seed)
    rows = hh_data.demonstration_rows(job.hh, data, data.of("a", "b"))
    params = sft.train(job.hh.sft, policy.config, policy.params, rows, seed=job.seed, keep=job.keep)
    sft.save(job.run, data.tokenizer, policy._replace(params=params))


def load_policy(job: Job, name: str, network: TransformerConfig) -> Params:
    """The SFT policy or one of act 3."""
    if name == "sft":
        return sft.load(job.run)[2]
    like = jax.eval_shape(lambda: transformer.init(jax.random.key(0), network))
    return checkpoint.restore(job.run / "policies" / name, like)


def reply_rows(job: Job, data: HHData, runs: Sequence[RLRun]) -> list[dict]:
    """Every policy's replies to the held-out prompts, each with its KL from SFT and both judges' scores."""
    tokenizer, network, reference = sft.load(job.run)
    pairs = hh_data.unique_prompts(data.of("held_out"))
    prompts = hh_data.prompt_rows(job.hh, data, pairs)
    judges = {d: kept_reward.load(job.run / "rewards" / name, network, tokenizer) for d, name in JUDGES.items()}
    num_samples, temperature, rows = job.hh.samples_per_prompt, job.hh.ppo.temperature, []
    sample = sampling.jitted_sampler(job.hh.lengths, network, None, tokenizer.pad_id, num_samples, temperature)
    for name in ("sft", *(run.name for run in runs)):
        key = jax.random.key(job.seed + (1 if name in COUPLED else 2))
        sampled = sampling.sample_all(sample, load_policy(job, name, network), prompts, key, batch_size=128)
        inputs = (sampled.tokens, sampled.segment_ids, sampled.completion_mask)
        ratios = sampled.logprobs - row_logprobs(network, reference, *inputs[:2], temperature=temperature)
        kl = row_sums(ratios, sampled.completion_mask)
        scores = {d: (score_rows(network, p, *inputs) - mean) / std for d, (p, mean, std) in judges.items()}
        for i, text in enumerate(sampling.completions(tokenizer, sampled)):
            rows.append(
                {
                    "kind": "reply",
                    "run": name,
                    "prompt_id": pairs[i // num_samples].id,
                    "sample": i % num_samples,
                    "prompt": pairs[i // num_samples].prompt[0].content,
                    "text": text,
                    "tokens": int(sampled.completion_mask[i].sum()),
                    "kl": float(kl[i]),
                    "judge": {domain: float(values[i]) for domain, values in scores.items()},
                }
            )
    return rows


def pair_rows(job: Job, data: HHData) -> list[dict]:
    """How the models order held-out pairs of their own domain and, but for the judges, all pairs of the other one."""
    rows = []
    for domain in DOMAINS:
        (other,) = (name for name in DOMAINS if name != domain)
        own = ("{}", "long_{}", "judge_{}")
        held_out, rest = data.of("held_out", domains=[domain]), data.of("a", "b", domains=[domain])
        names = [name.format(domain) for name in own] + [other, f"long_{other}"]
        rows += _pair_rows(job, data, domain, held_out, names, held_out=True)
        rows += _pair_rows(job, data, domain, rest, [other, f"long_{other}"], held_out=False)
    return rows


def _pair_rows(
    job: Job, data: HHData, domain: str, pairs: Sequence[Preference], models: Sequence[str], *, held_out: bool
) -> list[dict]:
    """`fixed` holds scores of replies cut to the fixed length, where both are longer; lengths are of uncut replies."""
    config, lengths = job.hh, hh_data.full_lengths(data, pairs)
    matched, long, fixed = (
        hh_data.matched_rows(config, data, pairs),
        hh_data.ranking_rows(config, data, pairs, length=config.long_length),
        hh_data.ranking_rows(config, data, pairs, length=config.fixed_length),
    )
    long_models = [name for name in models if name.startswith("long")]
    scores = {name: pair_scores(job, name, long if name in long_models else matched) for name in models}
    fixed_scores = {name: pair_scores(job, name, fixed) for name in long_models}
    return [
        {
            "kind": "pair",
            "domain": domain,
            "held_out": held_out,
            "id": pair.id,
            "tokens": lengths[i].tolist(),
            "characters": [len(pair.chosen), len(pair.rejected)],
            "markers": [has_marker(pair.chosen), has_marker(pair.rejected)],
            "scores": {name: values[i].tolist() for name, values in scores.items()},
            "fixed": {
                name: values[i].tolist()
                for name, values in fixed_scores.items()
                if min(lengths[i]) >= config.fixed_length
            },
        }
        for i, pair in enumerate(pairs)
    ]


def pair_scores(job: Job, name: str, rows: RankingBatch) -> np.ndarray:
    """Raw scores `[N, 2]` of chosen and rejected."""
    tokenizer, network, _ = sft.load(job.run)
    params, _, _ = kept_reward.load(job.run / "rewards" / name, network, tokenizer)
    inputs = (x.reshape(-1, x.shape[-1]) for x in (rows.tokens, rows.segment_ids, rows.completion_mask))
    return score_rows(network, params, *inputs).reshape(-1, 2)


def demonstration_rows(job: Job, data: HHData, runs: Sequence[RLRun]) -> list[dict]:
    """Held-out likelihood of every policy, in nats per row of packed chosen replies."""
    _, network, _ = sft.load(job.run)
    rows = hh_data.demonstration_rows(job.hh, data, data.of("held_out"))
    nll = {}
    for name in ("sft", *(run.name for run in runs)):
        logprobs = row_logprobs(network, load_policy(job, name, network), rows.tokens, rows.segment_ids)
        nll[name] = -row_sums(logprobs, rows.loss_mask)
    return [
        {"kind": "demonstration", "tokens": int(n), "nll": {name: float(values[i]) for name, values in nll.items()}}
        for i, n in enumerate(rows.loss_mask.sum(axis=1))
    ]


def judge(job: Job, data: HHData) -> None:
    """Write `samples.jsonl`, from which the report's every figure is computed."""
    runs = hh_rl.rl_runs(job.hh)
    header = {"kind": "data", **hh_data.counts(job.hh, data)}
    rows = [header, *pair_rows(job, data), *demonstration_rows(job, data, runs), *reply_rows(job, data, runs)]
    write_json_lines(job.run / "samples.jsonl", rows)


HEEDED = ("run", "resume", "force", "replay", "seed", "dataset", "data_dir", "model")
"""Fields of `rlhf.Config` that this job reads."""


def check_settings(config) -> None:
    """Refuse settings of the embedded world's acts, which would have no effect here."""
    default = type(config)()
    names = [field.name for field in dataclasses.fields(config) if field.name not in HEEDED]
    wrong = [name for name in names if getattr(config, name) != getattr(default, name)]
    if wrong:
        raise SystemExit(
            f"--dataset hh has its own numbers, and {', '.join(wrong)} would have no effect; nothing was started. "
            "Fix: leave those options away, or change hh_config.HHConfig"
        )


def main(config, numbers: HHConfig | None = None) -> dict:
    """Play what is not yet played, then judge; `config` is `rlhf.Config`."""
    check_settings(config)
    pairs = hh_data.read_pairs(config.data_dir)
    places = config.run, config.resume, config.seed, config.data_dir, config.model
    job = Job(*places, numbers or HHConfig(), force=config.force, replay=config.replay)
    run = open_run(job.run, job, resume=job.resume, force=job.force)
    note_command(run)
    data = hh_data.load(job.hh, pairs, run, model=job.model, seed=job.seed)
    print(hh_render.describe(hh_data.counts(job.hh, data)))
    timed(run, "sft", lambda: play_sft(job, data), run / "sft")
    timed(run, "reward_model", lambda: hh_rewards.play(job, data))
    for rl_run in hh_rl.rl_runs(job.hh):
        act, leftover = partial(hh_rl.play, job, data, rl_run), run / "policies" / rl_run.name
        timed(run, f"ppo_{rl_run.name}", act, leftover)
    timed(run, "judge", lambda: judge(job, data))
    settings = {"dataset": "hh", "seed": job.seed, "kl_target": job.hh.ppo.kl_target}
    result = hh_report.write(run, settings)
    Console().print(Markdown((run / "report.md").read_text(encoding="utf-8")))
    print(f"report, samples and curves in {run}")
    return result

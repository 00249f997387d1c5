"""The main job on real human comparisons (Bai et al. 2022): helpful against harmless, as a study of style.

    python experiments/rlhf.py --dataset hh --data-dir DIRECTORY --run runs/hh      # about ten minutes on two CPU cores
    python experiments/hh_report.py runs/hh                                         # computes every figure anew
    python experiments/hh_report.py runs/hh0 runs/hh1 runs/hh2                      # the criteria of several seeds

(1) supervised fine-tuning on chosen replies, (2) a helpful and a harmless reward model on half of the comparisons,
and two judges on the other half, (3) PPO towards `w z(helpful) + (1 - w) z(harmless)`, and what must hold or fail
beside it: PPO-ptx, a stiff leash, reward models that learned shuffled labels. Deviations from the paper: networks of
0.2 million parameters from random weights, the last human turn as prompt, the first tokens of the reply. The numbers
and the data are in `hh_data.py`, the acts in `hh_acts.py`, what is said about them in `hh_report.py`.
"""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import hh_acts
import hh_data
import hh_render
import hh_report
import jax
import numpy as np
import ppo
import reward_model
import sft
import task
from hh_acts import Job, RLRun
from hh_data import DOMAINS, HHConfig, HHData
from rich.console import Console
from rich.markdown import Markdown

from rlhf_jax.data.records import Preference
from rlhf_jax.functional.masking import masked_sum
from rlhf_jax.models import transformer
from rlhf_jax.models.transformer import TransformerConfig
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import open_run, write_json, write_json_lines
from rlhf_jax.types import Params

JUDGES = {domain: f"judge_{domain}" for domain in DOMAINS}
COUPLED = ("sft", "kl_coef_1e3")
"""Sampled with the same noise: what differs between them is what training did."""


def timed(run: Path, name: str, act: Callable[[], None]) -> None:
    """Play an act and note its seconds, which survive a resume."""
    path = run / "seconds.json"
    seconds = json.loads(path.read_text()) if path.exists() else {}
    if name in seconds:
        print(f"{name}: finished before, taken from {run}")
        return
    start = time.monotonic()
    act()
    write_json(path, {**seconds, name: round(time.monotonic() - start, 1)})


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
    judges = {d: reward_model.load(job.run / "rewards" / name, network, tokenizer) for d, name in JUDGES.items()}
    num_samples, rows = job.hh.samples_per_prompt, []
    sample = task.jitted_sampler(job.hh.lengths, network, tokenizer.eos_id, tokenizer.pad_id, num_samples)
    for name in ("sft", *(run.name for run in runs)):
        key = jax.random.key(job.seed + (1 if name in COUPLED else 2))
        sampled = task.sample_all(sample, load_policy(job, name, network), prompts, key, batch_size=128)
        inputs = (sampled.tokens, sampled.segment_ids)
        ratios = sampled.logprobs - hh_acts.row_logprobs(network, reference, *inputs)
        kl = masked_sum(ratios, sampled.completion_mask, axis=1)
        scores = {d: (hh_acts.score_rows(network, p, *inputs) - mean) / std for d, (p, mean, std) in judges.items()}
        for i, text in enumerate(task.completions(tokenizer, sampled)):
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
    """How the reward models order held-out pairs of their own domain and all pairs of the other one.

    `fixed` holds the scores of the replies cut to the fixed length, of pairs whose replies are both that long.
    """
    rows = []
    for domain in DOMAINS:
        own, other = data.of("held_out", domains=[domain]), data.of("a", "b", domains=[domain])
        rows += _pair_rows(job, data, domain, own, [*DOMAINS, JUDGES[domain]], held_out=True)
        rows += _pair_rows(job, data, domain, other, [d for d in DOMAINS if d != domain], held_out=False)
    return rows


def _pair_rows(
    job: Job, data: HHData, domain: str, pairs: Sequence[Preference], models: Sequence[str], *, held_out: bool
) -> list[dict]:
    lengths = hh_data.full_lengths(data, pairs)
    scores = {name: pair_scores(job, data, name, pairs, job.hh.reply_length) for name in models}
    fixed = {name: pair_scores(job, data, name, pairs, job.hh.fixed_length) for name in models if name in DOMAINS}
    return [
        {
            "kind": "pair",
            "domain": domain,
            "held_out": held_out,
            "id": pair.id,
            "tokens": lengths[i].tolist(),
            "characters": [len(pair.chosen), len(pair.rejected)],
            "markers": [hh_report.has_marker(pair.chosen), hh_report.has_marker(pair.rejected)],
            "scores": {name: values[i].tolist() for name, values in scores.items()},
            "fixed": {
                name: values[i].tolist() for name, values in fixed.items() if min(lengths[i]) >= job.hh.fixed_length
            },
        }
        for i, pair in enumerate(pairs)
    ]


def pair_scores(job: Job, data: HHData, name: str, pairs: Sequence[Preference], length: int) -> np.ndarray:
    """Raw scores `[N, 2]` of chosen and rejected."""
    tokenizer, network, _ = sft.load(job.run)
    params, _, _ = reward_model.load(job.run / "rewards" / name, network, tokenizer)
    rows = hh_data.ranking_rows(job.hh, data, pairs, length=length)
    flat = (-1, rows.tokens.shape[-1])
    return hh_acts.score_rows(network, params, rows.tokens.reshape(flat), rows.segment_ids.reshape(flat)).reshape(-1, 2)


def demonstration_rows(job: Job, data: HHData, runs: Sequence[RLRun]) -> list[dict]:
    """Held-out likelihood of every policy, in nats per row of packed chosen replies."""
    _, network, _ = sft.load(job.run)
    rows = hh_data.demonstration_rows(job.hh, data, data.of("held_out"))
    nll = {}
    for name in ("sft", *(run.name for run in runs)):
        logprobs = hh_acts.row_logprobs(network, load_policy(job, name, network), rows.tokens, rows.segment_ids)
        nll[name] = np.asarray(-masked_sum(logprobs, rows.loss_mask, axis=1))
    return [
        {"kind": "demonstration", "tokens": int(n), "nll": {name: float(values[i]) for name, values in nll.items()}}
        for i, n in enumerate(rows.loss_mask.sum(axis=1))
    ]


def judge(job: Job, data: HHData) -> None:
    """Write `samples.jsonl`, from which the report's every figure is computed."""
    runs = hh_acts.rl_runs(job.hh)
    header = {"kind": "data", **hh_data.counts(job.hh, data)}
    rows = [header, *pair_rows(job, data), *demonstration_rows(job, data, runs), *reply_rows(job, data, runs)]
    write_json_lines(job.run / "samples.jsonl", rows)


def check_settings(config) -> None:
    """Refuse numbers of the embedded world's acts, which would have no effect here."""
    given = {"sft": config.sft, "reward": config.reward, "ppo": config.ppo}
    unchanged = {"sft": sft.SFTConfig(), "reward": reward_model.RewardModelConfig(), "ppo": ppo.PPOConfig()}
    wrong = [name for name, value in given.items() if value != unchanged[name]]
    if wrong:
        raise SystemExit(
            f"--dataset hh has its own numbers, and {', '.join(wrong)} would have no effect; nothing was started. "
            "Fix: leave those options away, or change hh_data.HHConfig"
        )


def main(config, numbers: HHConfig | None = None) -> dict:
    """Play what is not yet played, then judge; `config` is `rlhf.Config`."""
    check_settings(config)
    pairs = hh_data.read_pairs(config.data_dir)
    job = Job(config.run, config.resume, config.seed, config.data_dir, numbers or HHConfig())
    run = open_run(job.run, job, resume=job.resume)
    data = hh_data.load(job.hh, pairs, run, seed=job.seed)
    print(hh_render.describe(hh_data.counts(job.hh, data)))
    timed(run, "sft", lambda: hh_acts.play_sft(job, data))
    timed(run, "reward_model", lambda: hh_acts.play_reward_models(job, data))
    for rl_run in hh_acts.rl_runs(job.hh):
        timed(run, f"ppo_{rl_run.name}", lambda rl_run=rl_run: hh_acts.play_run(job, data, rl_run))
    timed(run, "judge", lambda: judge(job, data))
    settings = {"dataset": "hh", "seed": job.seed, "kl_target": job.hh.ppo.kl_target}
    result = hh_report.write(run, settings)
    Console().print(Markdown((run / "report.md").read_text(encoding="utf-8")))
    print(f"report, samples and curves in {run}")
    return result

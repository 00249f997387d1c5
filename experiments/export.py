"""A model of a run as a Hugging Face folder: weights, tokenizer, generation config and a model card.

    python experiments/export.py --run runs/mine --act ppo --to out/mine

`transformers` reads it: policies as `AutoModelForCausalLM`, the reward model as `AutoModelForSequenceClassification` with
one label. The card names data, seed, commands and figures as the run's folder holds them.
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import judge
import kept_reward
import sft
import tyro

from rlhf_jax.data.tokenizers import save_tokenizer
from rlhf_jax.models import huggingface
from rlhf_jax.models.model_card import write_generation_config, write_model_card
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.runs import read_json_lines

ABOUT = {
    "sft": "A policy after supervised fine-tuning (act 1 of RLHF).",
    "ppo": "A policy after PPO towards a reward model, on a KL leash (act 3 of RLHF).",
    "reward_model": "A reward model (act 2 of RLHF): its score is the head's output at the last token.",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """What to export."""

    run: Path
    act: Literal["sft", "reward_model", "ppo"]
    to: Path
    """Folder to write; one that exists is never overwritten."""
    data: str | None = None
    """What it was trained on, for the card; none = as the run's settings say."""


def figures_of(run: Path) -> dict:
    """What the run measured: its report, or else the last row of metrics of every stage."""
    if (run / "report.json").exists():
        return json.loads((run / "report.json").read_text(encoding="utf-8"))
    path = run / "metrics.jsonl"
    return {row.pop("stage"): row for row in read_json_lines(path)} if path.exists() else {}


def main(config: Config) -> None:
    """Export."""
    run, act = config.run, config.act
    tokenizer, network, policy = sft.load(run)
    hf_config = checkpoint.read_notes(run / "sft")["hf_config"]
    settings = json.loads((run / "config.json").read_text(encoding="utf-8")) if (run / "config.json").exists() else {}
    figures, ids = figures_of(run), {"eos_id": tokenizer.eos_id, "pad_id": tokenizer.pad_id, "bos_id": tokenizer.bos_id}
    if act == "reward_model":
        params, mean, std = kept_reward.load(run, network, tokenizer)
        head = params["head"]  # the format has no place for a bias, which changes no comparison
        figures = {"score_mean": mean - float(head["bias"]), "score_std": std, **figures}
        params = {**params, "head": {**head, "bias": jnp.zeros_like(head["bias"])}}
    else:
        params = policy if act == "sft" else judge.load_policy(run, network, tokenizer)
    commands = (
        (run / "commands.txt").read_text(encoding="utf-8").splitlines() if (run / "commands.txt").exists() else []
    )

    def extra_files(folder: Path) -> None:
        save_tokenizer(tokenizer, folder)
        if act != "reward_model":
            write_generation_config(folder, **ids, do_sample=True, max_new_tokens=settings.get("response_length", 256))
        write_model_card(
            folder,
            title=config.to.name,
            about=ABOUT[act],
            data=str(config.data or settings.get("data") or settings.get("dataset") or "what the commands say"),
            seed=settings.get("seed", 0),
            commands=commands,
            figures=figures,
            settings=settings,
            base=settings.get("model"),
            tags=("rlhf", act),
        )

    if act == "reward_model":
        pad = tokenizer.pad_id
        huggingface.save_reward_model(config.to, params, hf_config, pad_token_id=pad, extra_files=extra_files)
    else:
        huggingface.save(config.to, params, hf_config, extra_files=extra_files)
    print(f"{config.to}: {sum(x.size for x in jax.tree.leaves(params)):,} parameters")


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))

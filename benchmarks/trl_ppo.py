"""TRL's PPO on the work of `accelerator.py --part ppo`, on the same GPU; with the environment that holds `trl==1.12.0`.

    python benchmarks/trl_ppo.py

prints one JSON line as `tasks.py` does. Four networks with random weights in bfloat16, all in it: parameters, gradients and
moments of Adam (ours keep float32 parameters and moments, which is more to move). Its last release with PPO is 1.12.
"""

import argparse
import json
import os
import statistics
import tempfile
import time

os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import numpy as np
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, LlamaConfig, PreTrainedTokenizerFast
from trl.experimental.ppo import PPOConfig, PPOTrainer

ONE_BILLION = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 8192,
}
TINY = {**ONE_BILLION, "vocab_size": 1024, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 8}


class Clock(transformers.TrainerCallback):
    """When each iteration ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, *args, **kwargs) -> None:
        """Waits for the device first."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())


def tokenizer() -> PreTrainedTokenizerFast:
    """Any: the trainer wants one, and decodes with it what it logs."""
    from tokenizers import Tokenizer, models

    words = {f"t{i}": i for i in range(ONE_BILLION["vocab_size"])}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="t3")),
        pad_token="t0",
        eos_token="t2",
        padding_side="left",
    )


def main() -> None:
    """One warm-up and `--steps` iterations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--shape", choices=("1b", "tiny"), default="1b")
    options = parser.parse_args()
    started, device = time.perf_counter(), "cuda" if torch.cuda.is_available() else "cpu"
    shape = ONE_BILLION if options.shape == "1b" else TINY
    network = LlamaConfig(**shape, head_dim=64, tie_word_embeddings=True, pad_token_id=0, eos_token_id=2, num_labels=1)

    def drawn(kind):
        with torch.device(device):
            return kind.from_config(network, dtype=torch.bfloat16)

    policy, reference = drawn(AutoModelForCausalLM), drawn(AutoModelForCausalLM)
    reference.load_state_dict(policy.state_dict())
    value, reward = drawn(AutoModelForSequenceClassification), drawn(AutoModelForSequenceClassification)
    episodes, prompt, rounds = 32, 64, 1 + options.steps
    ids = np.random.default_rng(0).integers(4, shape["vocab_size"], (episodes * rounds, prompt)).tolist()
    prompts, clock = Dataset.from_dict({"input_ids": ids}), Clock()
    args = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        total_episodes=episodes * rounds,
        per_device_train_batch_size=episodes,
        gradient_accumulation_steps=1,
        num_ppo_epochs=2,
        num_mini_batches=4,
        local_rollout_forward_batch_size=episodes,
        response_length=64,
        temperature=1.0,
        kl_coef=0.05,
        learning_rate=1e-5,
        lr_scheduler_type="constant",
        num_sample_generations=0,
        stop_token=None,
        bf16=False,  # the networks are in it; True would be autocast of float32 ones
        gradient_checkpointing=False,
        use_cpu=device == "cpu",
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer(),
        model=policy,
        ref_model=reference,
        reward_model=reward,
        value_model=value,
        train_dataset=prompts,
        eval_dataset=prompts.select(range(episodes)),
        callbacks=[clock],
    )
    trainer.train()
    taken = statistics.median(np.diff(clock.ends))
    found = {
        "lib": "trl",
        "task": "ppo",
        "shape": options.shape,
        "unit": "episodes/s",
        "value": round(episodes / taken, 3),
        "step_s_median": round(taken, 4),
        "time_to_first_step_s": round(clock.ends[0] - started, 1),
        "dtype": str(next(policy.parameters()).dtype),
        "versions": {"trl": trl.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
    }
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**30
        found |= {"peak_gib": round(peak, 2), "device": torch.cuda.get_device_name()}
    print(json.dumps(found))


if __name__ == "__main__":
    main()

"""A run's folder as the three acts leave it, with random networks in place of trained ones."""

import jax
import kept_reward
import sft
import task

from rlhf_jax.data import synthetic
from rlhf_jax.data.tokenizers import save_tokenizer, train_bpe
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.models.huggingface import Pretrained
from rlhf_jax.runtime import checkpoint

LENGTHS = {"prompt_length": 40, "response_length": 8, "row_length": 96}
SIZES = {"NUM_PROMPTS": 32, "NUM_HELD_OUT": 12}


def write_run(folder, *, policies=("ppo",), steps=(0,)):
    """Acts 1 and 2, and policies that differ in their seed."""
    texts = [f"{prompt} {response}" for prompt, response in synthetic.demonstrations(0, 200)]
    tokenizer = train_bpe(texts, vocab_size=600)
    save_tokenizer(tokenizer, folder / "tokenizer")
    small = sft.SFTConfig(model_dim=16, num_heads=2, mlp_dim=16, num_layers=1)
    network = sft.network_config(small, tokenizer.vocab_size)
    params = [transformer.init(jax.random.key(seed), network) for seed in range(2 + len(policies) * len(steps))]
    sft.save(folder, tokenizer, Pretrained(network, params[0], huggingface.llama_config(network)))
    reward = {"trunk": params[1], "head": init_reward_head(jax.random.key(0), network.model_dim)}
    kept_reward.save(folder, reward, tokenizer, mean=0.0, std=1.0)
    places = [(name, step) for name in policies for step in steps]
    for (name, step), policy in zip(places, params[2:], strict=True):
        checkpoint.save(folder / name, step, policy, notes={"tokenizer": tokenizer.fingerprint})
    return folder


def shrink(patch):
    """Fewer prompts."""
    for name, value in SIZES.items():
        patch.setattr(task, name, value)

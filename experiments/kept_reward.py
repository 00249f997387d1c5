"""A run's reward model, or a folder's: kept, loaded, and the moments of its scores."""

from pathlib import Path

import jax
import meshes
import sampling
import sft
import task
from meshes import COPIES, MeshConfig
from scoring import score_rows

from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import head_specs, init_reward_head
from rlhf_jax.models.parameters import Specs
from rlhf_jax.runtime import checkpoint
from rlhf_jax.types import Params, PromptBatch


def reference_moments(
    config: task.TaskConfig,
    network: TransformerConfig,
    tokenizer: Tokenizer,
    policy: Params,
    reward: tuple[TransformerConfig, Params],
    prompts: PromptBatch,
    *,
    seed: int,
) -> tuple[float, float]:
    """Mean and standard deviation of the raw scores on fresh samples of the SFT policy (lm-human-preferences #16)."""
    sample = sampling.jitted_sampler(config, network, tokenizer.eos_id, tokenizer.pad_id)
    sampled = sampling.sample_all(sample, policy, prompts, jax.random.key(seed), batch_size=256)
    scores = score_rows(*reward, sampled.tokens, sampled.segment_ids)
    return float(scores.mean()), float(scores.std())


def save(run: Path, params: Params, tokenizer: Tokenizer, *, mean: float, std: float) -> None:
    """Keep the reward model and the moments of its scores on the SFT policy's samples."""
    checkpoint.save(
        run / "reward_model", 0, params, notes={"mean": mean, "std": std, "tokenizer": tokenizer.fingerprint}
    )


def specs_of(network: TransformerConfig) -> Specs:
    """The arrays of a reward model, or of a separate critic, of this shape."""
    return {"trunk": transformer.param_specs(network), "head": head_specs(network.model_dim)}


def load(
    run: Path, network: TransformerConfig, tokenizer: Tokenizer, mesh: MeshConfig = COPIES
) -> tuple[Params, float, float]:
    """Act 2's reward model, on this mesh, and mean and standard deviation of its scores on the SFT policy's samples."""
    notes = checkpoint.read_notes(run / "reward_model")
    if notes["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"the reward model in {run} was trained with another tokenizer than the policy")
    shapes = jax.eval_shape(
        lambda: {
            "trunk": transformer.init(jax.random.key(0), network),
            "head": init_reward_head(jax.random.key(0), network.model_dim),
        }
    )
    like = meshes.like(shapes, specs_of(network), mesh)
    return checkpoint.restore(run / "reward_model", like), notes["mean"], notes["std"]


def load_folder(
    folder: Path, tokenizer: Tokenizer, *, dtype: str = "float32", mesh: MeshConfig = COPIES
) -> tuple[TransformerConfig, Params]:
    """A reward model in a Hugging Face folder: network and parameters. Its tokenizer must be the policy's."""
    theirs = load_tokenizer(folder)
    if theirs.fingerprint != tokenizer.fingerprint:
        raise ValueError(
            f"{folder}: the reward model's tokenizer ({theirs.fingerprint[:12]}, {theirs.vocab_size} ids) is not the policy's "
            f"({tokenizer.fingerprint[:12]}, {tokenizer.vocab_size} ids), so it would read other text than was written; "
            "nothing was started. Fix: a reward model trained on the policy's tokenizer"
        )
    loaded = huggingface.load_reward_model(folder, shard_fn=meshes.shard_fn(mesh))
    return sft.computed(loaded.config, dtype, mesh=mesh), loaded.params

"""Act 1, supervised fine-tuning: learn to answer from demonstrations (Ouyang et al. 2022, §3.5).

    python experiments/sft.py --run runs/mine

writes `runs/mine/sft` (the policy), which `reward_model.py` and `ppo.py` take up. Two CPU cores, about a minute; held-out
loss about 0.59 nats per token. Deviation from the paper: the network starts from random weights, unless `--model
DIRECTORY` names a checkpoint to start from (its learning rate wants to be a hundredth of the default).
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import jax
import meshes
import task
import tyro
from acts import alone, facts, is_played, note_command, num_steps_of
from meshes import COPIES, MeshConfig

from rlhf_jax.data.batching import batch_indices
from rlhf_jax.data.demonstrations import read_demonstrations
from rlhf_jax.data.tokenizers import Tokenizer, load_tokenizer, save_tokenizer
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.attention import best_for
from rlhf_jax.models.huggingface import Pretrained
from rlhf_jax.objectives import sft
from rlhf_jax.runtime import checkpoint
from rlhf_jax.runtime.metrics import MetricLog
from rlhf_jax.runtime.processes import is_first, meet
from rlhf_jax.runtime.resume import forget, guarded
from rlhf_jax.runtime.runs import open_run
from rlhf_jax.runtime.sharding import shard_batch
from rlhf_jax.training.evaluate import evaluate
from rlhf_jax.training.optimizers import adam_optimizer, warmup_cosine
from rlhf_jax.training.train_step import init_train_state, make_train_step
from rlhf_jax.types import Params, SequenceBatch


@dataclasses.dataclass(frozen=True)
class SFTConfig:
    """Numbers of act 1, and the shape of a network that starts from random weights."""

    num_epochs: float = 2.5
    batch_size: int = 32
    learning_rate: float = 4e-3
    num_micro_batches: int = 1
    save_every: int = 100
    """Steps from one checkpoint of the unfinished act to the next."""
    num_layers: int = 3
    model_dim: int = 80
    num_heads: int = 4
    mlp_dim: int = 192


@dataclasses.dataclass(frozen=True)
class Config(task.TaskConfig):
    """Act 1 alone."""

    sft: SFTConfig = SFTConfig()


def network_config(config: SFTConfig, vocab_size: int) -> TransformerConfig:
    """The policy's shape; reward model and critic have the same."""
    return TransformerConfig(
        vocab_size=vocab_size,
        num_layers=config.num_layers,
        model_dim=config.model_dim,
        num_heads=config.num_heads,
        num_kv_heads=config.num_heads,
        head_dim=config.model_dim // config.num_heads,
        mlp_dim=config.mlp_dim,
        unroll=config.num_layers,
    )


def computed(
    network: TransformerConfig, dtype: str, logits_chunk: int | None = None, *, mesh: MeshConfig = COPIES
) -> TransformerConfig:
    """The network in this dtype, with the best attention that this machine has, its logits in chunks, on this mesh."""
    attention_fn = best_for(jax.devices()[0], dtype=dtype, head_dim=network.head_dim)
    how = {"dtype": dtype, "attention_fn": attention_fn, "logits_chunk": logits_chunk}
    return meshes.network_on(dataclasses.replace(network, **how), mesh)


def start(
    config: SFTConfig,
    tokenizer: Tokenizer,
    *,
    model: Path | None,
    seed: int,
    dtype: str = "float32",
    logits_chunk: int | None = None,
    mesh: MeshConfig = COPIES,
) -> Pretrained:
    """What act 1 starts from: the checkpoint in the folder `model`, or random weights."""
    if model is None:
        network = computed(network_config(config, tokenizer.vocab_size), dtype, logits_chunk, mesh=mesh)
        init_fn, specs = partial(transformer.init, config=network), transformer.param_specs(network)
        params = meshes.born(init_fn, jax.random.key(seed), specs=specs, config=mesh)
        return Pretrained(network, params, huggingface.llama_config(network))
    loaded = huggingface.load(model, shard_fn=meshes.shard_fn(mesh))
    if tokenizer.vocab_size > loaded.config.vocab_size:
        raise ValueError(
            f"{model}: the tokenizer has ids up to {tokenizer.vocab_size - 1}, the embedding {loaded.config.vocab_size} "
            "rows; nothing was started. Fix: the weights and the tokenizer of one model"
        )
    print(f"{model}: {sum(x.size for x in jax.tree.leaves(loaded.params)):,} parameters")
    return loaded._replace(config=computed(loaded.config, dtype, logits_chunk, mesh=mesh))


def batches(data, batch_size: int) -> Iterator:
    """All rows of `data` once, in order; the remainder of an uneven division is left out."""
    num_rows = jax.tree.leaves(data)[0].shape[0]
    size = min(batch_size, num_rows)
    for start in range(0, num_rows - size + 1, size):
        yield jax.tree.map(lambda x, start=start: x[start : start + size], data)


def train(
    config: SFTConfig,
    network: TransformerConfig,
    params: Params,
    data: SequenceBatch,
    *,
    seed: int,
    keep: Callable,
    mesh: MeshConfig = COPIES,
) -> Params:
    """Fit the policy, from `params` (donated), to the demonstrations; `keep` is `task.keeper`'s."""
    num_rows = data.tokens.shape[0]
    num_steps = num_steps_of(config, num_rows, "packed rows of demonstrations")
    optimizer = adam_optimizer(warmup_cosine(config.learning_rate, num_steps=num_steps))
    objective = sft(transformer.causal_model(network))
    train_step = make_train_step(objective, optimizer, num_micro_batches=config.num_micro_batches)
    train_step = jax.jit(guarded(train_step), donate_argnums=0)
    state = meshes.put(init_train_state(params, optimizer), transformer.param_specs(network), mesh)
    devices, show = meshes.mesh_of(mesh), {"sft/nll": "nll", "sft/accuracy": "accuracy"}
    same = facts(config, seed=seed, data=data, start=params)
    with (
        keep("sft", state, save_every=config.save_every, facts=same) as kept,
        MetricLog(kept.log_to, "sft", num_steps, show=show, first_step=kept.first_step) as log,
    ):
        state = kept.state
        for step in range(kept.first_step, num_steps):
            rows = batch_indices(seed, step, num_examples=num_rows, batch_size=config.batch_size)
            batch = kept.batch(step, shard_batch(jax.tree.map(lambda x, rows=rows: x[rows], data), devices))
            state, metrics = train_step(state, batch)
            log.write(step, kept.check(step, state, metrics, batch), tokens=batch.tokens.size)
            kept.finish(step, state)
    return state.params


def save(run: Path, tokenizer: Tokenizer, policy: Pretrained) -> None:
    """Keep the policy of act 1; its network is described as a Hugging Face checkpoint describes it."""
    how = {name: getattr(policy.config, name) for name in ("unroll", "dtype", "logits_chunk")}
    notes = {"hf_config": policy.hf_config, **how, "tokenizer": tokenizer.fingerprint}
    checkpoint.save(run / "sft", 0, policy.params, notes=notes)
    forget(run, "sft")


def load(run: Path, mesh: MeshConfig = COPIES) -> tuple[Tokenizer, TransformerConfig, Params]:
    """The policy of act 1, on this mesh, with its tokenizer."""
    notes, tokenizer = checkpoint.read_notes(run / "sft"), load_tokenizer(run / "tokenizer")
    if notes["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"{run / 'tokenizer'} is not the tokenizer that the policy in {run / 'sft'} was trained with")
    network = dataclasses.replace(huggingface.transformer_config(notes["hf_config"]), unroll=notes["unroll"])
    how = notes.get("dtype", "float32"), notes.get("logits_chunk")  # older runs knew one of each
    network = computed(network, *how, mesh=mesh)
    return tokenizer, network, checkpoint.restore(run / "sft", policy_like(network, mesh))


def policy_like(network: TransformerConfig, mesh: MeshConfig) -> Params:
    """The shapes of a policy, and their places on the mesh, for `checkpoint.restore`."""
    shapes = jax.eval_shape(lambda: transformer.init(jax.random.key(0), network))
    return meshes.like(shapes, transformer.param_specs(network), mesh)


def take_up(config: task.TaskConfig) -> tuple[Tokenizer, TransformerConfig, Params]:
    """The policy that a later act starts from: act 1's of this run or, where there is none, `--model`, kept as act 1's."""
    run = config.run
    there = checkpoint.latest_step(run / "sft") is not None
    if config.model is not None and not (there and config.resume):
        if there:
            raise ValueError(f"{run / 'sft'} is there already; nothing was read. Fix: no --model, or another --run")
        tokenizer = load_tokenizer(config.model)
        how = {"dtype": config.dtype, "logits_chunk": config.logits_chunk, "mesh": config.mesh}
        policy = start(SFTConfig(), tokenizer, model=config.model, seed=config.seed, **how)
        if is_first():
            save_tokenizer(tokenizer, run / "tokenizer")
        meet("tokenizer")
        save(run, tokenizer, policy)
    return load(run, config.mesh)


def check_mesh(config: Config) -> None:
    """Refuse what the mesh cannot share evenly."""
    part = config.sft.batch_size // config.sft.num_micro_batches
    rows, columns = {"--sft.batch-size / --sft.num-micro-batches": part}, {"--row-length": config.row_length}
    meshes.check(config.mesh, rows=rows, columns=columns)


def main(config: Config) -> None:
    """Play act 1 and save the policy."""
    check_mesh(config)
    if config.data is not None:
        read_demonstrations(config.data)  # what is wrong with the file is told before the run's folder is opened
    run = open_run(config.run, config, resume=config.resume, force=config.force)
    note_command(run)
    if is_played(run, "sft", resume=config.resume):
        return
    tokenizer, demonstrations, held_out = task.load_demonstrations(config, run)
    options, how = (
        {"seed": config.seed, "mesh": config.mesh},
        {"dtype": config.dtype, "logits_chunk": config.logits_chunk},
    )
    policy = start(config.sft, tokenizer, model=config.model, **options, **how)
    data = task.demonstration_rows(config, tokenizer, demonstrations)
    network = policy.config
    params = train(config.sft, network, policy.params, data, keep=task.keeper(config), **options)
    save(run, tokenizer, policy._replace(params=params))
    held_out_rows = task.demonstration_rows(config, tokenizer, held_out)
    result = evaluate(sft(transformer.causal_model(network)))(params, batches(held_out_rows, 64))
    print(f"held-out loss {result['sft/nll']:.3f} nats per token; policy saved in {run / 'sft'}")


if __name__ == "__main__":
    settings = tyro.cli(Config, description=__doc__)
    with alone(settings):
        main(settings)

"""`--mesh.*`: scripts that split parameters make the numbers of copies, hold nothing whole, and refuse what does not divide."""

import contextlib
import dataclasses
import gc

import dpo
import grpo
import jax
import jax.numpy as jnp
import kept_reward
import meshes
import numpy as np
import ppo
import pytest
import reward_ensemble
import reward_model
import rlhf
import sft
import stories
import task
import tyro
from meshes import MeshConfig
from runtime.eight import Watch

from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.runtime.runs import read_json_lines
from rlhf_jax.types import Frozen

NETWORK = sft.SFTConfig(num_epochs=0.3, batch_size=8, model_dim=32, num_heads=2, mlp_dim=64, num_layers=2)
LENGTHS = {"prompt_length": 40, "response_length": 12, "row_length": 96, "vocab_size": 600}
FSDP, TENSOR = MeshConfig(fsdp=2), MeshConfig(tensor=2)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Act 1 with copies and with halves; the largest array that ever stood whole on a device."""
    patch = pytest.MonkeyPatch()
    for name, value in {"DEMONSTRATIONS": 300, "RANKINGS": 16, "PROMPTS": 16, "HELD_OUT": 20}.items():
        patch.setattr(task, f"NUM_{name}", value)
    folder = tmp_path_factory.mktemp("runs")
    config = sft.Config(run=folder / "copies", sft=NETWORK, **LENGTHS)
    sft.main(config)
    gc.collect()
    with Watch("f") as watch:
        sft.main(dataclasses.replace(config, run=folder / "halves", mesh=FSDP))
    yield folder, watch.largest
    patch.undo()


def test_halves_make_the_numbers_of_copies(runs):
    rows = [list(read_json_lines(runs[0] / name / "metrics.jsonl")) for name in ("copies", "halves")]
    assert len(rows[0]) == len(rows[1]) >= 3
    for ours, theirs in zip(*rows, strict=True):
        for name in ("loss", "sft/accuracy", "grad/norm"):
            np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-4)
    (*_, copies), (*_, halves) = (sft.load(runs[0] / name) for name in ("copies", "halves"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3), copies, halves)


def test_nothing_was_ever_whole(runs):
    """Born, trained, saved and judged in halves: the largest array on a device is half of the largest parameter."""
    folder, largest = runs
    _, network, params = sft.load(folder / "halves", FSDP)
    assert all(x.sharding.shard_shape(x.shape) != x.shape for x in jax.tree.leaves(params))
    assert network.constrain_fn is not sft.load(folder / "halves")[1].constrain_fn
    assert 0 < largest <= max(x.nbytes for x in jax.tree.leaves(params)) // 2


class ReachedError(Exception):
    """A training loop has its state."""


@contextlib.contextmanager
def stop(stage, state, **_):
    raise ReachedError(state)
    yield


def whole_arrays(train):
    """Names of the state's arrays that are whole on a device when the loop begins, but for scalars, one a member."""
    with pytest.raises(ReachedError) as reached:
        train()
    leaves = jax.tree_util.tree_leaves_with_path(reached.value.args[0])
    return {jax.tree_util.keystr(p) for p, x in leaves if x.size > 2 and x.sharding.shard_shape(x.shape) == x.shape}


def test_every_loop_has_its_state_in_halves(runs, monkeypatch):
    """Reward model, ensemble, DPO, PPO with a critic of another shape, GRPO, from act 1's files: none compiles a step."""
    run, kept = runs[0] / "halves", {"seed": 0, "keep": stop}
    tokenizer, network, policy = sft.load(run, FSDP)
    larger = dataclasses.replace(network, mlp_dim=96)
    reward = {"trunk": transformer.init(jax.random.key(1), larger), "head": init_reward_head(jax.random.key(1), 32)}
    rows = np.ones((16, 4, 8), np.int32)
    data = rankings_of(rows)
    prompts = task.PromptBatch(rows[:, 0], rows[:, 0] > 0)
    settings = reward_model.RewardModelConfig(batch_size=8, ensemble=2)
    objective = reward_model.build_objective(settings, network)
    frozen = meshes.put(
        Frozen(policy, reward, jnp.zeros(()), jnp.ones(())),
        Frozen(transformer.param_specs(network), kept_reward.specs_of(larger), None, None),
        FSDP,
    )
    lengths = sft.Config(run=run, mesh=FSDP, **LENGTHS)
    numbers = ppo.PPOConfig(num_iterations=1, batch_size=8)
    loops = [
        lambda: reward_model.train(settings, network, policy, data, mesh=FSDP, **kept),
        lambda: reward_ensemble.train(settings, network, objective, policy, data, mesh=FSDP, **kept),
        lambda: dpo.train(dpo.DPOConfig(batch_size=8), network, policy, data, mesh=FSDP, stage="dpo", **kept),
        lambda: ppo.train(numbers, lengths, network, tokenizer, frozen, prompts, reward_network=larger, **kept),
    ]
    for loop in loops:
        assert whole_arrays(loop) == set()


def rankings_of(rows):
    """Rankings without a meaning."""
    return task.RankingBatch(rows, rows, rows > 0, np.tile(np.arange(4), (16, 1)), np.ones((16, 4), bool))


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        (sft, "--mesh.fsdp 3", "--mesh: a mesh of .* needs a multiple of 3 devices, there are 2 .* Fix: other sizes"),
        (sft, "--mesh.data -1 --mesh.fsdp -1", "--mesh: mesh axes must be at least 1, at most one of them -1"),
        (sft, "--mesh.fsdp 2 --sft.batch-size 5", r"num-micro-batches 5: data x fsdp = 2 devices cannot share 5 rows"),
        (
            sft,
            "--sft.batch-size 6 --sft.num-micro-batches 2",
            r"share 3 rows evenly; nothing was started. Fix: 2 or 4,",
        ),
        (sft, "--mesh.sequence 2 --row-length 95", r"--row-length 95: sequence = 2 devices cannot share 95 columns"),
        (sft, "--mesh.tensor 2 --mesh.whole word", r"--mesh.whole word: nothing was started. Fix: of layers, vocab"),
        (reward_model, "--reward.batch-size 3", r"--reward.batch-size .* 3: data x fsdp = 2 devices"),
        (ppo, "--ppo.batch-size 6 --ppo.num-minibatches 2", r"--ppo.batch-size .* 3: data x fsdp = 2 devices"),
        (ppo, "--mesh.sequence 2", r"--prompt-length \+ --response-length 35: sequence = 2 devices cannot share 35"),
        (grpo, "--grpo.num-prompts 3", r"--grpo.num-prompts 3: data x fsdp = 2 devices"),
        (dpo, "--dpo.batch-size 7", r"--dpo.batch-size / --dpo.num-micro-batches 7: data x fsdp = 2 devices"),
        (rlhf, "--ppo.batch-size 4", r"--ppo.batch-size .* 1: data x fsdp = 2 devices"),
        (
            rlhf,
            "--dataset hh --mesh.fsdp 2",
            "--mesh: this script knows the data axis only; nothing was started. Fix: ",
        ),
        (stories, "--mesh.fsdp 2", "--mesh: this script knows the data axis only; nothing was started. Fix: "),
    ],
)
def test_what_cannot_be_shared_is_refused_in_one_line(script, flags, message, tmp_path):
    """Before the run's folder is made."""
    config = tyro.cli(script.Config, args=["--run", str(tmp_path / "run"), *flags.split()])
    with pytest.raises(SystemExit, match=message) as refused:
        script.main(config)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "run").exists()


def test_a_vocabulary_that_does_not_divide(runs, tmp_path):
    """Is refused with the flag that leaves it whole."""
    tokenizer = load_tokenizer(runs[0] / "halves" / "tokenizer")
    network = transformer.TransformerConfig(
        vocab_size=601, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=2, head_dim=4, mlp_dim=8
    )
    huggingface.save(
        tmp_path / "model", transformer.init(jax.random.key(0), network), huggingface.llama_config(network)
    )
    options = {"model": tmp_path / "model", "seed": 0}
    with pytest.raises(
        SystemExit, match=r"\(vocab\) has size 601, which mesh axis tensor of 2 .*flag: --mesh.whole and its name"
    ):
        sft.start(NETWORK, tokenizer, mesh=TENSOR, **options)
    loaded = sft.start(NETWORK, tokenizer, mesh=dataclasses.replace(TENSOR, whole=("vocab",)), **options)
    assert loaded.params["embedding"].sharding.is_fully_replicated
    assert loaded.params["layers"]["up"].sharding.shard_shape((1, 8, 8)) == (1, 8, 4)


def test_rankings_have_columns_for_the_sequence_axis(runs):
    config = sft.Config(run=runs[0], mesh=MeshConfig(sequence=2), **LENGTHS)
    tokenizer = load_tokenizer(runs[0] / "halves" / "tokenizer")
    records = [task.Ranking("0", (task.Message("user", "a b"),), ("c", text), (0, 1)) for text in ("d", "d e")]
    lengths = [task.ranking_rows(config, tokenizer, [one], num_responses=2).tokens.shape[-1] for one in records]
    assert all(length % 2 == 0 for length in lengths)

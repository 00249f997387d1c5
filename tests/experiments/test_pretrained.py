"""`--model DIRECTORY` and back: acts that start from a checkpoint, and what they leave as one."""

import dataclasses
from functools import partial

import acts
import evaluate
import export
import jax
import jax.numpy as jnp
import kept_reward
import numpy as np
import ppo
import pytest
import sft
import task
from scoring import score_rows

from rlhf_jax.data.tokenizers import byte_tokenizer, load_tokenizer, save_tokenizer, train_bpe
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.models.architecture import TransformerConfig
from rlhf_jax.models.heads import init_reward_head
from rlhf_jax.runtime import checkpoint
from rlhf_jax.types import SequenceBatch

SHAPE = {"num_layers": 1, "model_dim": 16, "num_heads": 2, "num_kv_heads": 1, "head_dim": 8, "mlp_dim": 24}
LENGTHS = {"prompt_length": 40, "response_length": 12, "row_length": 96}


@pytest.fixture(scope="module", autouse=True)
def _sliver():
    patch = pytest.MonkeyPatch()
    for name, value in {"DEMONSTRATIONS": 200, "RANKINGS": 16, "PROMPTS": 64, "HELD_OUT": 20}.items():
        patch.setattr(task, f"NUM_{name}", value)
    yield
    patch.undo()


def write_checkpoint(folder, tokenizer, *, seed, head=False, vocab_size=None, **shape):
    network = TransformerConfig(vocab_size=vocab_size or tokenizer.vocab_size + 3, **{**SHAPE, **shape})
    params, extra = transformer.init(jax.random.key(seed), network), lambda to: save_tokenizer(tokenizer, to)
    hf_config = huggingface.llama_config(network)
    if head:
        both = {"trunk": params, "head": init_reward_head(jax.random.key(seed), network.model_dim)}
        huggingface.save_reward_model(folder, both, hf_config, pad_token_id=tokenizer.pad_id, extra_files=extra)
    else:
        huggingface.save(folder, params, hf_config, extra_files=extra)
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A policy, and a reward model of another shape, with one tokenizer."""
    root = tmp_path_factory.mktemp("checkpoints")
    tokenizer = train_bpe(["what is two and two? it is four, of course."] * 3, vocab_size=280)
    policy = write_checkpoint(root / "policy", tokenizer, seed=0)
    return policy, write_checkpoint(root / "reward", tokenizer, seed=1, head=True, num_layers=2)


@pytest.fixture(scope="module")
def run(folders, tmp_path_factory):
    """Act 3 from two foreign checkpoints, without acts 1 and 2."""
    policy, reward = folders
    run = tmp_path_factory.mktemp("runs") / "foreign"
    numbers = ppo.PPOConfig(num_iterations=1, batch_size=8, num_epochs=1, num_minibatches=1, policy_every=1)
    ppo.main(ppo.Config(run=run, model=policy, reward_model=reward, ppo=numbers, **LENGTHS))
    return run


def test_act_3_from_foreign_checkpoints(run, folders):
    """The reference is the given policy, bit for bit; the policy has moved from it."""
    tokenizer, network, reference = sft.load(run)
    given = huggingface.load(folders[0])
    assert tokenizer.fingerprint == load_tokenizer(folders[0]).fingerprint
    jax.tree.map(np.testing.assert_array_equal, reference, given.params)
    moved = checkpoint.restore(run / "ppo", jax.eval_shape(lambda: reference))
    assert any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), moved, reference)))
    assert network.vocab_size == tokenizer.vocab_size + 3


def test_logits_in_chunks_are_kept_with_the_policy(folders, tmp_path):
    """`--logits-chunk`: later acts find it in act 1's folder; loss and gradient are those of all logits at once."""
    sft.take_up(sft.Config(run=tmp_path / "run", model=folders[0], logits_chunk=5, **LENGTHS))
    _, network, params = sft.load(tmp_path / "run")
    assert network.logits_chunk == 5
    tokens = jax.random.randint(jax.random.key(0), (3, 9), 0, network.vocab_size)
    batch = SequenceBatch(tokens, jnp.ones_like(tokens), tokens % 3 > 0)

    def loss(network):
        return jax.jit(jax.value_and_grad(lambda params: sft.sft(transformer.causal_model(network))(params, batch)[0]))

    chunked, whole = (loss(dataclasses.replace(network, logits_chunk=size))(params) for size in (5, None))
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-5), chunked, whole)


def test_policies_are_kept_on_the_way(run, folders):
    """The last of them is the act's own; those of an attempt that was cut off, perhaps with other settings, go."""
    like = jax.eval_shape(lambda params: params, sft.load(run)[2])
    kept = checkpoint.restore(run / "ppo_steps", like, step=1)
    jax.tree.map(np.testing.assert_array_equal, kept, checkpoint.restore(run / "ppo", like))
    keep_policy = acts.policy_keeper(run, "some", load_tokenizer(folders[0]), every=2)
    for step in range(1, 9):
        keep_policy(step, kept)
    assert sorted(int(path.name) for path in (run / "some_steps").iterdir()) == [2, 4, 6, 8]
    zeros = jax.tree.map(np.zeros_like, kept)
    for step in range(3, 6):
        keep_policy(step, zeros)
    assert sorted(int(path.name) for path in (run / "some_steps").iterdir()) == [2, 4]
    jax.tree.map(np.testing.assert_array_equal, zeros, checkpoint.restore(run / "some_steps", like))


@pytest.fixture(scope="module")
def exported(run, tmp_path_factory):
    """The policy of `run` as a folder."""
    to = tmp_path_factory.mktemp("exported") / "policy"
    export.main(export.Config(run=run, act="ppo", to=to))
    return to


def test_an_evaluation_of_folders_is_that_of_the_run(run, folders, exported, tmp_path):
    """Policy, baseline and reward model read from folders give the figures that the run's own give."""
    shared = {"reward_model": folders[1], "num_prompts": 6, "num_samples": 2, **LENGTHS}
    of_run = evaluate.main(evaluate.Config(run=run, policies=("ppo", "ppo_steps"), **shared))
    of_folders = evaluate.main(evaluate.Config(run=tmp_path / "run", model=exported, baseline=folders[0], **shared))
    names = [row.pop("policy") for row in of_folders["policies"]]
    assert names == ["baseline", "policy"]
    assert [row.pop("policy") for row in of_run["policies"]] == ["baseline", "ppo", "ppo_steps"]
    assert of_folders["policies"] == of_run["policies"][:2]
    assert of_run["policies"][2]["objective/kl"] > 0
    assert of_folders["policies"][0]["win_rate"] == 0.5
    other = write_checkpoint(tmp_path / "other", byte_tokenizer(), seed=1)
    with pytest.raises(ValueError, match="its tokenizer is not the baseline's, so KL has no meaning"):
        evaluate.main(evaluate.Config(run=run, model=other, **shared))


def test_act_1_starts_from_the_checkpoint(folders, tmp_path):
    """With a learning rate of 0 it ends where it began; its tokenizer is the checkpoint's."""
    numbers = sft.SFTConfig(num_epochs=1, batch_size=16, learning_rate=0.0)
    config = sft.Config(run=tmp_path / "run", model=folders[0], sft=numbers, **LENGTHS)
    sft.main(config)
    tokenizer, _, params = sft.load(config.run)
    assert tokenizer.fingerprint == load_tokenizer(folders[0]).fingerprint
    jax.tree.map(np.testing.assert_array_equal, params, huggingface.load(folders[0]).params)
    with pytest.raises(ValueError, match="is there already; nothing was read"):
        sft.take_up(config)


def test_reward_model_of_another_tokenizer_is_refused(folders, tmp_path):
    other = write_checkpoint(tmp_path / "other", byte_tokenizer(), seed=1, head=True)
    with pytest.raises(
        ValueError, match=r"other: the reward model's tokenizer \(.*, 259 ids\) is not the policy's.*Fix"
    ):
        kept_reward.load_folder(other, load_tokenizer(folders[0]))


def test_tokenizer_beyond_the_embedding_is_refused(tmp_path):
    small = write_checkpoint(tmp_path / "small", byte_tokenizer(), seed=0, vocab_size=200)
    config = task.TaskConfig(run=tmp_path / "run", model=small)
    with pytest.raises(ValueError, match="ids up to 258, the embedding 200 rows; nothing was started"):
        sft.take_up(config)
    assert not (tmp_path / "run").exists()


def test_exported_policy_is_what_torch_loads(run, exported):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    tokenizer, network, reference = sft.load(run)
    params = checkpoint.restore(run / "ppo", jax.eval_shape(lambda: reference))
    tokens = np.arange(3, 15, dtype=np.int32)[None]
    hidden, _ = transformer.hidden(params, network, tokens, jnp.arange(12)[None], jnp.ones((1, 12), jnp.int32))
    ours = transformer.unembed(params, network, hidden)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(str(exported))
    with torch.no_grad():
        logits = theirs(torch.tensor(tokens, dtype=torch.long)).logits.numpy()
    np.testing.assert_allclose(ours, logits, atol=2e-5 * np.abs(logits).max())
    assert theirs.generation_config.eos_token_id == tokenizer.eos_id
    assert load_tokenizer(exported).fingerprint == tokenizer.fingerprint
    card = (exported / "README.md").read_text()
    assert "python " in card
    assert "| ppo.objective/kl |" in card


def test_exported_reward_model_orders_alike(run, folders, tmp_path):
    """The head's bias has no place there: it is left away, and moments and order follow."""
    tokenizer, network, policy = sft.load(run)
    head = init_reward_head(jax.random.key(5), network.model_dim)
    head = {**head, "bias": jnp.asarray(0.5)}
    copy = tmp_path / "run"
    sft.save(copy, tokenizer, huggingface.Pretrained(network, policy, huggingface.llama_config(network)))
    save_tokenizer(tokenizer, copy / "tokenizer")
    kept_reward.save(copy, {"trunk": policy, "head": head}, tokenizer, mean=0.7, std=2.0)
    export.main(export.Config(run=copy, act="reward_model", to=tmp_path / "out"))
    out, rows = kept_reward.load_folder(tmp_path / "out", tokenizer), np.arange(3, 27, dtype=np.int32).reshape(2, 12)
    here = score_rows(network, {"trunk": policy, "head": head}, rows, np.ones_like(rows))
    there = score_rows(*out, rows, np.ones_like(rows))
    assert abs(here[0] - here[1]) > 1e-3
    np.testing.assert_allclose(there, here - 0.5, atol=1e-5)
    assert "| score_mean | 0.2 |" in (tmp_path / "out" / "README.md").read_text()

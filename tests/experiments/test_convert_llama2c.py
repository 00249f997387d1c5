"""A real pretrained model, converted: its logits, its greedy story, its tokenizer, its likelihood of real stories."""

import gzip
import json

import convert_llama2c
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rlhf_jax.data.tokenizers import load_tokenizer
from rlhf_jax.generation.generate import generate
from rlhf_jax.models import huggingface, transformer
from rlhf_jax.objectives import sequence_token_logprobs
from rlhf_jax.types import PromptBatch


@pytest.fixture(scope="module")
def converted(data_dir, tmp_path_factory):
    source, to = data_dir / "weights" / "stories260K", tmp_path_factory.mktemp("converted") / "stories"
    convert_llama2c.main(convert_llama2c.Config(source / "stories260K.bin", source / "tok512.bin", to))
    return source, to


@pytest.fixture(scope="module")
def reference(converted):
    return json.loads((converted[0] / "reference.json").read_text())


def test_logits(converted):
    source, folder = converted
    config, params, _ = huggingface.load(folder)
    known = np.load(source / "reference_logits.npz")
    tokens = jnp.asarray(known["ids"])[None]
    states, _ = transformer.hidden(params, config, tokens, jnp.arange(64)[None], jnp.ones((1, 64), jnp.int32))
    logits = transformer.unembed(params, config, states)[0]
    np.testing.assert_allclose(logits, known["logits"], atol=2e-5 * np.abs(known["logits"]).max())


def test_greedy_story(converted, reference):
    """Token by token and character by character."""
    config, params, _ = huggingface.load(converted[1])
    tokenizer = load_tokenizer(converted[1])
    ids = reference["greedy_ids_from_bos"]
    sample = jax.jit(
        lambda p, b: generate(
            transformer.causal_model(config),
            p,
            b,
            jax.random.key(0),
            max_new_tokens=len(ids) - 1,
            eos_id=tokenizer.eos_id,
            pad_id=0,
            top_k=1,
        )
    )
    prompt = PromptBatch(jnp.asarray([[tokenizer.bos_id]]), jnp.ones((1, 1), bool))
    tokens = np.asarray(sample(params, prompt).tokens[0])
    assert tokens.tolist() == ids
    assert tokenizer.decode(tokens.tolist()) == reference["greedy_text"]


def test_tokenizer(converted, reference):
    tokenizer = load_tokenizer(converted[1])
    for case in reference["encode_cases"]:
        if case["text"]:
            assert [tokenizer.bos_id, *tokenizer.encode(case["text"])] == case["ids"], case["text"]
            assert tokenizer.decode(case["ids"]) == case["text"]


def test_likelihood_of_real_stories(converted, reference, data_dir):
    config, params, _ = huggingface.load(converted[1])
    tokenizer, known = load_tokenizer(converted[1]), reference["tinystories_sample_nll"]
    text = gzip.decompress((data_dir / "text" / "tinystories_sample.txt.gz").read_bytes()).decode("utf-8")
    stories = [story.strip() for story in text.split(known["split_on"]) if story.strip()]
    rows = [[tokenizer.bos_id, *tokenizer.encode(story)][: known["truncate"]] for story in stories]
    tokens, segments = np.zeros((2, len(rows), max(map(len, rows))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], segments[i, : len(row)] = row, 1
    logprobs = jax.jit(lambda p, *batch: sequence_token_logprobs(transformer.causal_model(config), p, *batch))
    totals = -np.where(segments > 0, logprobs(params, jnp.asarray(tokens), jnp.asarray(segments)), 0.0)
    for i, (nll, count) in enumerate(known["per_story"]):
        assert len(rows[i]) - 1 == count
        np.testing.assert_allclose(totals[i, 1:].sum(), nll, rtol=1e-4)


def test_cut_weights_are_refused(converted, tmp_path):
    (tmp_path / "cut.bin").write_bytes((converted[0] / "stories260K.bin").read_bytes()[:-4000])
    with pytest.raises(ValueError, match=r"cut.bin: ends after \d+ numbers, more are needed"):
        convert_llama2c.read_weights(tmp_path / "cut.bin")

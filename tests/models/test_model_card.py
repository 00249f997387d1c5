"""What lies beside the weights is what other tools read."""

import json

import pytest

from rlhf_jax.models.model_card import write_generation_config, write_model_card

CARD = {
    "title": "tiny",
    "about": "A policy.",
    "data": "stories",
    "seed": 3,
    "commands": ["python train.py --seed 3"],
    "figures": {"win_rate": {"mean": 0.81234567, "n": 512, "judge": "a rule"}, "kl": 4.0},
    "settings": {"learning_rate": 1e-3, "folder": "runs/x"},
}


def test_generation_config_is_what_transformers_reads(tmp_path):
    transformers = pytest.importorskip("transformers")
    write_generation_config(tmp_path, eos_id=2, pad_id=0, do_sample=True, temperature=0.7, max_new_tokens=9)
    config = transformers.GenerationConfig.from_pretrained(str(tmp_path))
    assert (config.eos_token_id, config.pad_token_id, config.bos_token_id) == (2, 0, None)
    assert (config.do_sample, config.temperature, config.max_new_tokens) == (True, 0.7, 9)


def test_card_names_seed_data_command_and_figures(tmp_path):
    write_model_card(tmp_path, **CARD, base='a "b"')
    text = (tmp_path / "README.md").read_text()
    _, header, body = text.split("---\n", maxsplit=2)
    assert 'base_model: "a \\"b\\""' in header
    assert "library_name: transformers" in header
    for word in ("Data: stories.", "Seed: 3.", "python train.py --seed 3", "| win_rate.judge | a rule |"):
        assert word in body, word
    assert "| win_rate.mean | 0.8123 |" in body
    assert "| win_rate.n | 512 |" in body
    settings = body.split("```json\n")[1].split("\n```")[0]
    assert json.loads(settings) == CARD["settings"]


def test_card_without_base_and_figures(tmp_path):
    write_model_card(tmp_path, **{**CARD, "figures": {}})
    text = (tmp_path / "README.md").read_text()
    assert "starting from random weights" in text
    assert "No figures were measured." in text
    assert "base_model" not in text

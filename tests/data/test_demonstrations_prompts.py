"""Demonstration and prompt readers, from their own files and from records of other kinds."""

import json

import pytest

from rlhf_jax.data.demonstrations import chosen_demonstrations, read_demonstrations
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import read_preferences
from rlhf_jax.data.prompts import read_prompts, unique_prompts
from rlhf_jax.data.records import DataReport, Demonstration, Message, Preference, Prompt

ASK = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "2+2?"}]
ASKED = (Message("system", "be brief"), Message("user", "2+2?"))


def write(tmp_path, *records):
    path = tmp_path / "sft.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def test_demonstrations(tmp_path):
    path = write(
        tmp_path,
        {"id": "d", "prompt": ASK, "response": " 4"},
        {"prompt": ASK, "response": "four"},
        {"prompt": ASK, "response": "four"},
        {"prompt": ASK, "response": "\t"},
        {"prompt": [], "response": "4"},
    )
    records, report = read_demonstrations(path)
    assert records == [Demonstration("d", ASKED, " 4"), Demonstration("sft/1", ASKED, "four")]
    assert report == DataReport(read=5, kept=2, duplicates=1, empty_responses=1, empty_prompts=1)


def test_refused_demonstrations(tmp_path):
    path = write(tmp_path, {"prompt": ASK, "answer": "4"}, {"prompt": ASK, "response": ["4"]})
    with pytest.raises(DataError) as caught:
        read_demonstrations(path)
    first, second = str(caught.value).split("\n  ")[1:]
    assert first == f"{path}:1: field 'response' is missing (found: answer, prompt); fix: add 'response' to the record"
    assert second == f"{path}:2: field 'response' is an array, expected a string; fix: write it as a JSON string"


def test_chosen_demonstrations():
    assert chosen_demonstrations([Preference("p", ASKED, "4", "5")]) == [Demonstration("p", ASKED, "4")]


def test_prompts(tmp_path):
    path = write(
        tmp_path,
        {"id": "x", "prompt": ASK, "label": "safe"},
        {"prompt": ASK, "responses": ["a"], "ranks": "whatever"},
        {"prompt": ASK[1:], "chosen": "4", "rejected": "5"},
        {"prompt": [{"role": "user", "content": " "}]},
    )
    records, report = read_prompts(path)
    assert records == [Prompt("x", ASKED), Prompt("sft/2", ASKED[1:])]
    assert report == DataReport(read=4, kept=2, duplicates=1, empty_prompts=1)
    with pytest.raises(DataError, match=r"sft\.jsonl:1: field 'prompt' is missing.*fix: add 'prompt'"):
        read_prompts(write(tmp_path, {"question": "2+2?"}))


def test_unique_prompts():
    records = [Preference("a", ASKED, "4", "5"), Demonstration("b", ASKED, "4"), Prompt("c", ASKED[1:])]
    assert unique_prompts(records) == [Prompt("a", ASKED), Prompt("c", ASKED[1:])]


@pytest.mark.parametrize(
    ("name", "kept"),
    [("alpaca_en_demo", 984), ("instruction_short", 886), ("oasst_en100", 191), ("self_instruct_seed", 175)],
)
def test_real_demonstrations(data_dir, name, kept):
    records, report = read_demonstrations(data_dir / "sft" / f"{name}.jsonl.gz")
    assert len(records) == report.kept == kept
    assert report.read == report.kept + report.duplicates


def test_real_prompts(data_dir):
    records, report = read_prompts(data_dir / "prompts" / "xstest_v2.jsonl.gz")
    assert report == DataReport(read=450, kept=450)
    assert records[0].id == "xstest/1"
    path = data_dir / "preferences" / "hh_harmless_base.jsonl.gz"
    from_file, report = read_prompts(path)
    assert report.kept + report.duplicates == report.read == 1899
    assert len({p.prompt for p in from_file}) == report.kept < 1899
    from_records = unique_prompts(read_preferences(path)[0])
    assert {p.prompt for p in from_records} <= {p.prompt for p in from_file}

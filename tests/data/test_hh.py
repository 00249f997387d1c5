"""Raw hh-rlhf layouts: the warts of transcripts one by one, the real files against the clean ones."""

import gzip
import json

import pytest

from rlhf_jax.data.json_lines import DataError, UnusableError
from rlhf_jax.data.preferences import (
    hh_pair,
    parse_transcript,
    read_dsp_text_score,
    read_hh,
    read_preferences,
    text_score_pair,
)
from rlhf_jax.data.records import DataReport, Dropped, Message, Preference


def write(tmp_path, *records, name):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def clean_lines(path):
    records = map(json.loads, gzip.decompress(path.read_bytes()).splitlines())
    return [(tuple(Message(**m) for m in r["prompt"]), r["chosen"], r["rejected"]) for r in records]


def test_transcript():
    messages, reply = parse_transcript("\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant: so long")
    assert messages == (Message("user", "hi"), Message("assistant", "hello"), Message("user", "bye"))
    assert reply == "so long"


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", ["a", "b", "c"]),  # two Human turns in a row
        ("\n\nHuman: a\n\nAssistant: ", ["a", ""]),  # empty reply
        ("\n\nHuman: a\n\nAssistant:", ["a", ""]),  # not even the space
        ("\n\nHuman:  a \n\nAssistant:  b \n", [" a ", " b \n"]),  # exactly one space goes
        (
            "\n\nHuman: say Human: or\nAssistant: please\n\nAssistant: ok",
            ["say Human: or\nAssistant: please", "ok"],
        ),
        ("\n\nHuman: a\n\n\n\nAssistant: b", ["a\n\n", "b"]),
        ("\n\nHuman: “ä”\u2028b\n\nAssistant: c\n\nd", ["“ä”\u2028b", "c\n\nd"]),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", ["a", "b", "c"]),
    ],
)
def test_transcript_warts(text, contents):
    messages, reply = parse_transcript(text)
    assert [*(message.content for message in messages), reply] == contents


def test_no_transcript():
    for text in ("", "hello", "Human: a\n\nAssistant: b", "x\n\nHuman: a\n\nAssistant: b"):
        with pytest.raises(UnusableError, match="not with a speaker; fix: start it with"):
            parse_transcript(text)
    with pytest.raises(UnusableError, match="ends in a Human turn; fix: end it with"):
        parse_transcript("\n\nHuman: a\n\nAssistant: b\n\nHuman: c")


def test_hh_pairs_that_are_none():
    ask = "\n\nHuman: a\n\nAssistant: "
    assert hh_pair("x", ask + "b", ask + "c") == Preference("x", (Message("user", "a"),), "b", "c")
    assert hh_pair("x", ask + "b", "\n\nHuman: A\n\nAssistant: c") == Dropped("differing_prompts")
    assert hh_pair("x", ask + "b", ask + "c\n\nHuman: d") == Dropped("unanswered")


def test_read_hh(tmp_path):
    ask = "\n\nHuman: a\n\nAssistant: "
    records = [
        {"chosen": ask + "b", "rejected": ask + "c"},
        {"chosen": ask + "b", "rejected": "\n\nHuman: z\n\nAssistant: c"},
        {"chosen": ask, "rejected": ask + "c"},
        {"chosen": ask + "d", "rejected": ask + "c"},
    ]
    pairs, report = read_hh(write(tmp_path, *records, name="test.jsonl"))
    assert [p.id for p in pairs] == ["test/0", "test/3"]
    assert report == DataReport(read=4, kept=2, differing_prompts=1, empty_responses=1)
    path = write(tmp_path, *records, name="download")
    assert [p.id for p in read_hh(path, name="helpful/test")[0]] == ["helpful/test/0", "helpful/test/3"]
    with pytest.raises(DataError, match=r"test\.jsonl:1: a transcript starts with 'b', not with a speaker; fix: "):
        read_hh(write(tmp_path, {"chosen": "b", "rejected": ask + "c"}, name="test.jsonl"))


def test_raw_harmless_is_the_clean_file(data_dir):
    raw = gzip.decompress((data_dir / "raw" / "hh_harmless_base.test.jsonl.gz").read_bytes()).splitlines()
    pairs = [hh_pair(str(i), r["chosen"], r["rejected"]) for i, r in enumerate(map(json.loads, raw))]
    assert sum(p == Dropped("differing_prompts") for p in pairs) == 5
    parsed = [(p.prompt, p.chosen, p.rejected) for p in pairs if isinstance(p, Preference)]
    assert parsed == clean_lines(data_dir / "preferences" / "hh_harmless_base.jsonl.gz")

    read, report = read_hh(data_dir / "raw" / "hh_harmless_base.test.jsonl.gz")
    clean, _ = read_preferences(data_dir / "preferences" / "hh_harmless_base.jsonl.gz")
    assert [(p.prompt, p.chosen, p.rejected) for p in read] == [(p.prompt, p.chosen, p.rejected) for p in clean]
    assert report == DataReport(read=1904, kept=1895, empty_responses=4, differing_prompts=5)
    positions = [int(p.id.removeprefix("hh_harmless_base.test/")) for p in read]
    assert all(json.loads(raw[i])["chosen"].endswith(p.chosen) for i, p in zip(positions, read, strict=True))


def test_raw_helpful_is_the_clean_file(data_dir):
    path = data_dir / "raw" / "hh_helpful_base.dsp_text_score.json.gz"
    pairs = [
        text_score_pair(str(i), *item["text"]) for i, item in enumerate(json.loads(gzip.decompress(path.read_bytes())))
    ]
    parsed = [(p.prompt, p.chosen, p.rejected) for p in pairs if isinstance(p, Preference)]
    assert parsed == clean_lines(data_dir / "preferences" / "hh_helpful_base.jsonl.gz")
    _, report = read_dsp_text_score(path)
    assert report == DataReport(read=1887, kept=1878, empty_responses=2, differing_prompts=7)


def test_raw_webgpt_is_the_clean_file(data_dir):
    records, report = read_dsp_text_score(data_dir / "raw" / "webgpt_comparisons.dsp_text_score.json.gz")
    assert report == DataReport(read=710, kept=518, ties=192)
    expected = clean_lines(data_dir / "preferences" / "webgpt_comparisons.jsonl.gz")
    assert [(r.prompt, r.chosen, r.rejected) for r in records] == expected


def test_text_score(tmp_path):
    texts = ["## Human:\nq\n\n\n## Assistant:\n bad", "## Human:\nq\n\n## Assistant:\ngood\n"]
    other = ["## Human:\nq\n\n## Assistant:\na", "## Human:\nr\n\n## Assistant:\nb"]
    path = tmp_path / "x.json"
    items = [
        {"text": texts, "score": [0.5, 1.5]},
        {"text": texts, "score": [1, 1]},
        {"text": other, "score": [1, 0]},
    ]
    path.write_text(json.dumps(items))
    records, report = read_dsp_text_score(path)
    assert records == [Preference("x/0", (Message("user", "q"),), "good\n", " bad")]
    assert report == DataReport(read=3, kept=1, ties=1, differing_prompts=1)
    path.write_text(json.dumps([{"text": [*texts, "c"], "score": [1, 0, 0]}]))
    with pytest.raises(DataError, match=r"x\.json: item 0: 3 texts and 3 scores, expected two of each; fix: split"):
        read_dsp_text_score(path)
    path.write_text(json.dumps([{"text": ["a", "b"], "score": [1, 0]}]))
    with pytest.raises(DataError, match=r"x\.json: item 0: a transcript starts with 'a'"):
        read_dsp_text_score(path)

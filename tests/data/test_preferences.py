"""Preference and ranking readers: the real files, what is dropped and counted, and what is refused."""

import gzip
import json
from collections import Counter

import pytest

from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import (
    dense_ranks,
    preference_ranking,
    ranking_pairs,
    read_preferences,
    read_rankings,
)
from rlhf_jax.data.records import DataReport, Message, Preference, Ranking

ASK = [{"role": "user", "content": "2+2?"}]
ASKED = (Message("user", "2+2?"),)


def pair(**changes):
    return {"id": "p/0", "prompt": ASK, "chosen": "4", "rejected": "5"} | changes


def write(tmp_path, *records, name="prefs.jsonl"):
    path = tmp_path / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def as_tuple(raw):
    return tuple(Message(m["role"], m["content"]) for m in raw["prompt"]), raw["chosen"], raw["rejected"]


def clean_lines(path):
    return [as_tuple(json.loads(line)) for line in gzip.decompress(path.read_bytes()).splitlines()]


# --- the clean schema -----------------------------------------------------------------------------


def test_reads_a_preference(tmp_path):
    records, report = read_preferences(write(tmp_path, pair(source="x", margin=2), pair(id="p/1", chosen="four")))
    assert records == [Preference("p/0", ASKED, "4", "5"), Preference("p/1", ASKED, "four", "5")]
    assert report == DataReport(read=2, kept=2)
    assert str(report) == "2 of 2 kept"


def test_a_missing_id_becomes_file_and_position(tmp_path):
    record = pair()
    del record["id"]
    (first, second), _ = read_preferences(write(tmp_path, record, record | {"chosen": "four"}))
    assert (first.id, second.id) == ("prefs/0", "prefs/1")


def test_useless_pairs_are_dropped_and_counted(tmp_path):
    records, report = read_preferences(
        write(
            tmp_path,
            pair(),
            pair(id="p/1"),
            pair(id="p/2", chosen=" \n"),
            pair(id="p/3", rejected=""),
            pair(id="p/4", rejected="4"),
            pair(id="p/5", prompt=[]),
            pair(id="p/6", prompt=[{"role": "user", "content": " "}]),
            pair(id="p/7", chosen="5", rejected="4"),
        )
    )
    assert [record.id for record in records] == ["p/0", "p/7"]
    assert report == DataReport(
        read=8,
        kept=2,
        empty_responses=2,
        identical_responses=1,
        duplicates=1,
        empty_prompts=2,
        contradictions=1,
    )
    text = str(report)
    assert text.startswith("2 of 8 kept; dropped: ")
    assert text.endswith("; kept: 1 contradictions")
    for part in ("2 empty responses", "1 identical responses", "1 duplicates", "2 empty prompts"):
        assert part in text


def test_reports_add_up():
    assert DataReport(read=2, kept=1, ties=1) + DataReport(read=3, kept=3) == DataReport(read=5, kept=4, ties=1)


def without(name):
    return {key: value for key, value in pair().items() if key != name}


@pytest.mark.parametrize(
    ("record", "what", "fix"),
    [
        (without("rejected"), "field 'rejected' is missing (found: chosen, id, prompt)", "add 'rejected'"),
        (pair(chosen=True), "field 'chosen' is a boolean, expected a string", "JSON string"),
        (pair(chosen=None), "field 'chosen' is null, expected a string", "JSON string"),
        (pair(id=7), "field 'id' is an integer, expected a string", "JSON string"),
        (
            pair(prompt="2+2?"),
            "field 'prompt' is a string, expected an array of messages",
            '[{"role": "user"',
        ),
        (pair(prompt=["2+2?"]), "field 'prompt[0]' is a string, expected an object", '{"role": "user"'),
        (pair(prompt=[{"role": "user"}]), "field 'prompt[0].content' is missing", "its 'content'"),
        (pair(prompt=[{"role": "user", "content": 1.5}]), "'prompt[0].content' is a number", "its 'content'"),
        (
            pair(prompt=[*ASK, {"role": "bot", "content": "x"}]),
            "field 'prompt[1].role': unknown role 'bot' (allowed: system, user, assistant)",
            "rename the role",
        ),
        (
            pair(prompt=[*ASK, {"role": "system", "content": "x"}]),
            "field 'prompt[1].role': a system message after another message",
            "put the system message first",
        ),
    ],
)
def test_refused_fields_name_line_field_and_fix(tmp_path, record, what, fix):
    path = write(tmp_path, pair(id="p/1"), record)
    with pytest.raises(DataError) as caught:
        read_preferences(path)
    where, told = str(caught.value).split("\n  ")[1].split(": ", 1)
    assert where == f"{path}:2"
    assert what in told
    assert fix in str(caught.value).split("; fix: ", 1)[1]


def test_one_id_for_two_records_and_nothing_usable_are_refused(tmp_path):
    with pytest.raises(
        DataError, match=r"prefs\.jsonl: id 'p/0' names two different records, the 1\. and the 2\.; .*fix"
    ):
        read_preferences(write(tmp_path, pair(), pair(chosen="four")))
    with pytest.raises(DataError, match=r"no usable record \(0 of 1 kept; dropped: 1 empty responses\); fix:"):
        read_preferences(write(tmp_path, pair(chosen="")))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hh_harmless_base", DataReport(read=1899, kept=1895, empty_responses=4)),
        ("hh_helpful_base", DataReport(read=1880, kept=1878, empty_responses=2)),
        ("dpo_zh_demo", DataReport(read=242, kept=233, duplicates=9)),
        ("llmbar_processed_human", None),
        ("pandalm_human", DataReport(read=692, kept=583, empty_responses=52, duplicates=57)),
        ("webgpt_comparisons", DataReport(read=518, kept=518)),
    ],
)
def test_real_preferences(data_dir, name, expected):
    path = data_dir / "preferences" / f"{name}.jsonl.gz"
    records, report = read_preferences(path)
    useful = Counter(clean_lines(path))
    useful = {c for c in useful if c[1].strip() and c[2].strip() and c[1] != c[2]}
    assert {(r.prompt, r.chosen, r.rejected) for r in records} == useful
    assert len(records) == len(useful) == report.kept
    assert expected is None or report == expected


# --- rankings --------------------------------------------------------------------------------


def ranking(**changes):
    return {"id": "r/0", "prompt": ASK, "responses": ["a", "b", "c"], "ranks": [1, 0, 1]} | changes


def test_ranks_and_scores(tmp_path):
    scored = {"id": "r/1", "prompt": ASK, "responses": ["a", "b", "c"], "scores": [0.5, -1, 0.5]}
    both = ranking(id="r/2", ranks=[0, 2, 2], scores=[3, 1, 1])
    records, report = read_rankings(write(tmp_path, ranking(), scored, both))
    assert [record.ranks for record in records] == [(1, 0, 1), (0, 1, 0), (0, 1, 1)]
    assert report == DataReport(read=3, kept=3, contradictions=2)  # b > a and b > c against their reverse


def test_dense_ranks():
    assert dense_ranks([5, 2, 5, 9]) == (1, 0, 1, 2)
    assert dense_ranks([]) == ()


def test_useless_responses_leave_a_ranking(tmp_path):
    records, report = read_rankings(
        write(
            tmp_path,
            ranking(responses=["a", " ", "c"], ranks=[2, 0, 1]),
            ranking(id="r/1", responses=["same", "b", "same"], ranks=[2, 1, 0]),
            ranking(id="r/2", responses=["a", "a", ""], ranks=[0, 1, 2]),
            ranking(id="r/3", responses=["x", "y", "z"], ranks=[0, 0, 0]),
            ranking(id="r/4", responses=["z", "y", "x"], ranks=[0, 0, 0]),
            ranking(id="r/5", prompt=[]),
        )
    )
    assert [(r.responses, r.ranks) for r in records] == [
        (("a", "c"), (1, 0)),
        (("b", "same"), (1, 0)),
        (("x", "y", "z"), (0, 0, 0)),
    ]
    assert report == DataReport(
        read=6,
        kept=3,
        empty_responses=2,
        identical_responses=2,
        too_few_responses=1,
        duplicates=1,
        empty_prompts=1,
        all_tied=1,
    )


@pytest.mark.parametrize(
    ("record", "what", "fix"),
    [
        (ranking(ranks=[0, 1]), "3 responses but 2 ranks or scores", "give each response one"),
        (ranking(responses=["a"], ranks=[0]), "1 responses, expected two or more", "at least two"),
        (ranking(ranks=[1, 2, 3]), "the smallest of 'ranks' is 1, expected 0", "count from 0 = best"),
        (ranking(ranks=[0, 1.0, 2]), "field 'ranks[1]' is a number, expected an integer", "without quotes"),
        (ranking(ranks=[0, True, 2]), "field 'ranks[1]' is a boolean, expected an integer", "without quotes"),
        (ranking(ranks={}), "field 'ranks' is an object, expected an array", "[...]"),
        (
            ranking(responses=["a", None, "c"]),
            "field 'responses[1]' is null, expected a string",
            "JSON string",
        ),
        (ranking(scores=[1, 0, 1]), "'ranks' and 'scores' order the responses differently", "keep one"),
        ({"prompt": ASK, "responses": ["a", "b"]}, "neither 'ranks' nor 'scores' is there", "add 'ranks'"),
        ({"prompt": ASK, "responses": ["a"], "scores": ["1"]}, "'scores[0]' is a string", "without quotes"),
    ],
)
def test_refused_rankings(tmp_path, record, what, fix):
    path = write(tmp_path, record)
    with pytest.raises(DataError) as caught:
        read_rankings(path)
    where, _, told_fix = str(caught.value).partition("; fix: ")
    assert f"{path}:1: " in where
    assert what in where
    assert fix in told_fix


def test_ranking_pairs():
    pairs = ranking_pairs(Ranking("r", ASKED, ("a", "b", "c"), (1, 0, 1)))
    assert pairs == [Preference("r/1>0", ASKED, "b", "a"), Preference("r/1>2", ASKED, "b", "c")]
    preference = Preference("p", ASKED, "good", "bad")
    assert preference_ranking(preference) == Ranking("p", ASKED, ("good", "bad"), (0, 1))
    assert ranking_pairs(preference_ranking(preference)) == [Preference("p/0>1", ASKED, "good", "bad")]


def test_real_rankings(data_dir):
    records, report = read_rankings(data_dir / "rankings" / "oasst_en100.jsonl.gz")
    assert report == DataReport(read=167, kept=167)
    assert Counter(len(r.responses) for r in records) == {3: 89, 2: 50, 4: 20, 6: 5, 5: 2, 9: 1}
    assert sum(len(ranking_pairs(r)) for r in records) == sum(len(r.ranks) * (len(r.ranks) - 1) // 2 for r in records)
    records, report = read_rankings(data_dir / "rankings" / "qa_feedback_dev.jsonl.gz")
    assert report == DataReport(read=391, kept=391, all_tied=11)
    assert records[0].ranks == (2, 1, 3, 0)  # scores 1.5, 2.0, 0.0, 2.5
    _, report = read_rankings(data_dir / "preferences" / "webgpt_comparisons.ties.jsonl.gz")
    assert report == DataReport(read=192, kept=192, all_tied=192)

"""Records that nobody would write, through every reader: kept, counted, or refused with a place and a fix."""

import json
import re

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from rlhf_jax.data.demonstrations import read_demonstrations
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import read_dsp_text_score, read_hh, read_preferences, read_rankings
from rlhf_jax.data.prompts import read_prompts

OF_THE_FILE = "holds no record|no usable record|names two different records"
"""What is wrong with no single line."""

ROWS = 10
"""Records of one file."""

TEXT = st.sampled_from(["", " ", "yes", "no", "\u2028", "<|im_end|>", "\x00", "é🎈"]) | st.text(max_size=8)
TURNS = st.lists(st.sampled_from(["\n\nHuman:", "\n\nAssistant:", "Human:", " hi", "", "\n\n"]), max_size=6)
REPLY = TEXT.map("\n\nHuman: hi\n\nAssistant: {}".format)
TRANSCRIPT = REPLY | REPLY | REPLY | TURNS.map("".join)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=4,
)
ROLE = st.sampled_from(["user", "assistant", "system", "bot"])
MESSAGE = st.fixed_dictionaries({"role": ROLE | ANYTHING, "content": TEXT | ANYTHING})
MESSAGES = st.just([{"role": "user", "content": "hi"}]) | TEXT.map(lambda text: [{"role": "user", "content": text}])
NUMBERS = st.just([0, 1]) | st.lists(st.integers(0, 3) | st.floats(), min_size=2, max_size=2)


def record(**fields):
    """Fields that fit; in one of four records also fields that nearly fit, of any other type, or missing."""
    strange = st.fixed_dictionaries(
        {}, optional={name: kind | ANYTHING | st.lists(MESSAGE | TEXT) for name, kind in fields.items()}
    )
    return st.integers(0, 3).flatmap(lambda i: strange if i == 3 else st.fixed_dictionaries(fields))


READERS = {
    read_demonstrations: record(id=TEXT, prompt=MESSAGES, response=TEXT),
    read_preferences: record(id=TEXT, prompt=MESSAGES, chosen=TEXT, rejected=TEXT),
    read_rankings: record(
        id=TEXT,
        prompt=MESSAGES,
        responses=st.just(["a", "b"]) | st.lists(TEXT, max_size=4),
        ranks=st.just([0, 1]) | NUMBERS,
        scores=st.just([1, 0]) | NUMBERS,
    ),
    read_prompts: record(id=TEXT, prompt=MESSAGES),
    read_hh: record(chosen=TRANSCRIPT, rejected=TRANSCRIPT),
    read_dsp_text_score: record(text=st.lists(TRANSCRIPT, min_size=2, max_size=2), score=NUMBERS),
}


HELLO = [{"role": "user", "content": "hi"}]
PLAIN = {
    read_demonstrations: {"prompt": HELLO, "response": "yes"},
    read_preferences: {"prompt": HELLO, "chosen": "yes", "rejected": "no"},
    read_rankings: {"prompt": HELLO, "responses": ["a", "b"], "ranks": [0, 1]},
    read_prompts: {"prompt": HELLO},
    read_hh: {"chosen": "\n\nHuman: hi\n\nAssistant: yes", "rejected": "\n\nHuman: hi\n\nAssistant: no"},
    read_dsp_text_score: {
        "text": ["\n\nHuman: hi\n\nAssistant: yes", "\n\nHuman: hi\n\nAssistant: no"],
        "score": [2, 1],
    },
}
"""A record of each kind that is read."""


def lines_of(rows, ends):
    """A file of them, in which a line may be cut, doubled, or another encoding's."""
    lines = [json.dumps(row).encode() + end for row, end in zip(rows, ends, strict=True)]
    return b"\n".join(lines)


def check(reader, path, content):
    """One of the two ends that there are; returns how many records were read."""
    path.write_bytes(content)
    try:
        records, report = reader(path)
    except DataError as error:
        message = str(error)
    else:
        assert report.read >= report.kept == len(records)
        return report.read
    assert str(path) in message
    for problem in message.splitlines()[1:] or [message]:
        assert re.search(r":\d+|item \d+", problem) or re.search(OF_THE_FILE, problem), problem
        assert "fix: " in problem or "reading stopped here" in problem, problem
    return 0


def fuzz(reader, path, num_records):
    """So many places for records, in files of ten or of one; the plain one at least must get through."""
    read = 0
    rows = st.lists(READERS[reader], min_size=ROWS, max_size=ROWS) | st.lists(READERS[reader], min_size=1, max_size=1)
    ends = st.lists(
        st.sampled_from([b"", b"", b"", b"", b"", b"", b"", b"\r", b"}", b"\xff"]), min_size=ROWS, max_size=ROWS
    )

    @settings(
        max_examples=num_records // ROWS,
        deadline=None,
        database=None,
        derandomize=True,
        suppress_health_check=list(HealthCheck),
    )
    @example([PLAIN[reader]], [b""] * ROWS)
    @given(rows, ends)
    def run(rows, ends):
        nonlocal read
        whole = json.dumps(rows).encode()
        read += check(reader, path, whole if reader is read_dsp_text_score else lines_of(rows, ends[: len(rows)]))

    run()
    assert read > 0


@pytest.mark.parametrize("reader", READERS)
def test_no_record_is_too_strange(tmp_path, reader):
    fuzz(reader, tmp_path / "records.jsonl", 1000)


@pytest.mark.slow
@pytest.mark.parametrize("reader", READERS)
def test_ten_thousand_records(tmp_path, reader):
    fuzz(reader, tmp_path / "records.jsonl", 10_000 * 2)  # half of the files have one record, half of them ten

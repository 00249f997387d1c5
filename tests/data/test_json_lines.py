"""Strict JSON Lines: what is accepted, and the place and the fix in every refusal."""

import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.json_lines import (
    MAX_PROBLEMS,
    DataError,
    UnusableError,
    load_strict,
    parse_array,
    parse_lines,
    read_json_lines,
)


def write(tmp_path, content, name="prefs.jsonl"):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_reads_plain_gzip_bom_crlf_and_blank_lines(tmp_path):
    content = '\ufeff{"a": "é"}\r\n\r\n{"a": "\u2028"}\n'.encode()
    expected = [(1, {"a": "é"}), (3, {"a": "\u2028"})]
    assert list(read_json_lines(write(tmp_path, content))) == expected
    assert list(read_json_lines(write(tmp_path, gzip.compress(content), "prefs.jsonl.gz"))) == expected
    assert list(read_json_lines(write(tmp_path, gzip.compress(content), "download"))) == expected


def test_yields_before_the_whole_file_is_read(tmp_path):
    lines = read_json_lines(write(tmp_path, '{"a": 1}\n{"a": \n'))
    assert next(lines) == (1, {"a": 1})
    with pytest.raises(DataError, match=r"prefs\.jsonl:2:7"):
        next(lines)


@pytest.mark.parametrize(
    ("line", "place", "what", "fix"),
    [
        (b'{"a": 1,}', "2:9", "not valid JSON", "one complete JSON object per line"),
        (b'{"a": "cut', "2:7", "not valid JSON", "no line end: the file may be cut off"),
        (b'{"b": "NaN", "a": NaN}\n', "2:19", "NaN is not a finite number", "drop the record"),
        (b'{"a": [-Infinity]}\n', "2:8", "-Infinity is not a finite number", "drop the record"),
        (b'{"a": 1e999}\n', "2:7", "1e999 is not a finite number", "drop the record"),
        (b'{"a": 1, "b": 2, "a": 3}\n', "2", "key 'a' occurs twice", "keep one"),
        (b'{"m": [{"role": "a", "role": "b"}]}\n', "2", "key 'role' occurs twice", "keep one"),
        (b"[1, 2]\n", "2", "holds an array, expected an object", '{"field": value'),
        (b"null\n", "2", "holds null, expected an object", '{"field": value'),
        ('{"a": "é'.encode() + b'\xff"}\n', "2:9", "byte 0xff is not UTF-8", "save the file as UTF-8"),
        (b'{"a": "\\ud83c"}\n', "2", "half of a surrogate pair", "write the text as UTF-8"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", "2", "nested too deeply", "flat records"),
        (b'{"a": ' + b"1" * 5000 + b"}\n", "2", "not valid JSON", "sensible size"),
    ],
)
def test_refusals_name_place_and_fix(tmp_path, line, place, what, fix):
    path = write(tmp_path, b'{"ok": 1}\n' + line)
    with pytest.raises(DataError) as caught:
        list(read_json_lines(path))
    message = str(caught.value)
    assert f"{path}:{place}: " in message
    assert what in message
    assert fix in message.split("fix: ", 1)[1]
    assert "1 problem, no record was used" in message


def test_a_whole_surrogate_pair_is_text():
    assert load_strict('"\\ud83c\\udf88"') == "🎈"


def test_problems_are_collected_up_to_a_limit(tmp_path):
    path = write(tmp_path, '{"ok": 1}\n' + "oops\n" * 5)
    with pytest.raises(DataError, match="5 problems") as caught:
        list(read_json_lines(path))
    assert str(caught.value).count("\n  ") == 5
    path = write(tmp_path, "oops\n" * 100)
    with pytest.raises(DataError, match="reading stopped here, there may be more") as caught:
        list(read_json_lines(path))
    assert str(caught.value).count("\n  ") == MAX_PROBLEMS


def test_missing_empty_and_damaged_files(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: No such file.*fix: check the path"):
        list(read_json_lines(tmp_path / "nowhere.jsonl"))
    with pytest.raises(DataError, match="fix: check the path"):
        list(read_json_lines(tmp_path))
    for content in (b"", b"\n\n"):
        with pytest.raises(DataError, match=r"holds no record.*fix: check that the file was written fully"):
            list(read_json_lines(write(tmp_path, content)))
    lines = b"".join(json.dumps({"a": i, "b": i * 7919 % 9973}).encode() + b"\n" for i in range(3000))
    packed = gzip.compress(lines)
    damaged = bytearray(packed)
    damaged[len(packed) // 2] ^= 0xFF
    for content in (packed[: len(packed) // 2], bytes(damaged)):
        with pytest.raises(DataError, match=r"gzip data is cut off or damaged.*fix: copy the file again|problem"):
            list(read_json_lines(write(tmp_path, content, "x.jsonl.gz")))


def test_parser_refusals_and_malformed_lines_are_listed_together(tmp_path):
    def parse(line, record):
        if record["a"] == 2:
            raise UnusableError("two is too many", "take one")
        return record["a"]

    assert parse_lines(write(tmp_path, '{"a": 1}\n{"a": 3}\n'), parse) == [1, 3]
    path = write(tmp_path, '{"a": 1}\n{"a": 2}\n{"a"}\n{"a": 2}\n')
    with pytest.raises(DataError, match="3 problems") as caught:
        parse_lines(path, parse)
    lines = str(caught.value).splitlines()[1:]
    assert [line.split(": ")[0].removeprefix(f"  {path}:") for line in lines] == ["2", "3:5", "4"]
    assert lines[0].endswith("two is too many; fix: take one")


def test_parse_array(tmp_path):
    def parse(position, record):
        return position, record["a"]

    assert parse_array(write(tmp_path, '[\n {"a": 1},\n {"a": 2}\n]', "x.json"), parse) == [(0, 1), (1, 2)]
    with pytest.raises(DataError, match=r"x\.json: item 1: holds a string, expected an object"):
        parse_array(write(tmp_path, '[{"a": 1}, "b"]', "x.json"), parse)
    with pytest.raises(DataError, match=r"x\.json: holds an object, expected an array"):
        parse_array(write(tmp_path, "{}", "x.json"), parse)
    with pytest.raises(DataError, match=r"x\.json:2: not valid JSON"):
        parse_array(write(tmp_path, '[{"a": 1},\n oops]', "x.json"), parse)
    with pytest.raises(DataError, match=r"x\.json:3: NaN is not a finite number"):
        parse_array(write(tmp_path, '[{"a": 1},\n\n {"a": NaN}]', "x.json"), parse)
    with pytest.raises(DataError, match="holds no record"):
        parse_array(write(tmp_path, "[]", "x.json"), parse)
    with pytest.raises(DataError, match="0xff is not UTF-8"):
        parse_array(write(tmp_path, b'["\xff"]', "x.json"), parse)


@pytest.fixture(scope="module")
def fuzz_file(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "fuzz.jsonl"


JSON_LIKE = st.one_of(
    st.binary(max_size=60),
    st.text(alphabet='{}[]",:\\u dD8aNIin019eE+-.\n', max_size=60).map(str.encode),
)


@settings(max_examples=150, deadline=None, database=None)
@given(JSON_LIKE)
def test_any_bytes_give_objects_or_a_data_error_with_a_place(fuzz_file, content):
    fuzz_file.write_bytes(content)
    try:
        records = list(read_json_lines(fuzz_file))
    except DataError as error:
        records, message = [], str(error)
    else:
        message = f"{fuzz_file}"
    assert message.startswith(f"{fuzz_file}")
    for _, record in records:
        json.dumps(record, allow_nan=False, ensure_ascii=False).encode()

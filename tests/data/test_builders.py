"""Dataset builders: prepared once, read by index, equal to what the readers give, without TensorFlow."""

import gzip
import http.server
import json
import shutil
import subprocess
import sys
import threading

import pytest

from rlhf_jax.data.builders import (
    Demonstrations,
    HHPreferences,
    Preferences,
    Prompts,
    Rankings,
    hh,
    open_source,
    prepare,
)
from rlhf_jax.data.demonstrations import read_demonstrations
from rlhf_jax.data.json_lines import DataError
from rlhf_jax.data.preferences import read_hh, read_preferences, read_rankings
from rlhf_jax.data.prompts import read_prompts

ASK = [
    {"role": "user", "content": "é\u2028?"},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "?"},
]
PAIR = {"id": "p/0", "prompt": ASK, "chosen": " 4\n🎈", "rejected": "5"}
OTHER = PAIR | {"id": "p/1", "prompt": ASK[:1]}


def write(path, *records):
    path.parent.mkdir(parents=True, exist_ok=True)
    data = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)
    return path


RANKING = {"id": "r/0", "prompt": ASK, "responses": ["é", "b", "c"], "ranks": [1, 0, 1]}


@pytest.mark.parametrize(
    ("builder", "reader", "records"),
    [
        (Preferences, read_preferences, [PAIR, OTHER]),
        (
            Rankings,
            read_rankings,
            [RANKING, RANKING | {"id": "r/1", "responses": ["x", "y"], "ranks": [0, 1]}],
        ),
        (Demonstrations, read_demonstrations, [{"id": "d/0", "prompt": ASK, "response": "é"}]),
        (Prompts, read_prompts, [PAIR, OTHER]),
    ],
)
def test_prepared_records_are_those_of_the_reader(tmp_path, builder, reader, records):
    path = write(tmp_path / "records.jsonl", *records)
    expected, report = reader(path)
    prepared = prepare(builder, tmp_path / "out", path=path)
    source = open_source(prepared)
    assert len(source) == len(expected)
    assert set(source) == set(expected)
    assert {source[i] for i in range(len(source))} == set(expected)
    assert json.loads((prepared / "metadata.json").read_text()) == {"records.jsonl": str(report)}


def test_real_files(data_dir, tmp_path):
    path = data_dir / "rankings" / "oasst_en100.jsonl.gz"
    assert set(open_source(prepare(Rankings, tmp_path, path=path))) == set(read_rankings(path)[0])


def test_a_folder_of_files_and_preparation_once(tmp_path):
    folder = tmp_path / "in"
    write(folder / "a.jsonl", PAIR)
    write(folder / "b.jsonl.gz", OTHER)
    prepared = prepare(Preferences, tmp_path / "out", path=folder)
    assert {record.id for record in open_source(prepared)} == {"p/0", "p/1"}
    stamp = (prepared / "dataset_info.json").stat().st_mtime_ns
    assert prepare(Preferences, tmp_path / "out", path=folder) == prepared
    assert (prepared / "dataset_info.json").stat().st_mtime_ns == stamp
    write(folder / "a.jsonl", PAIR | {"chosen": "changed"})
    changed = prepare(Preferences, tmp_path / "out", path=folder)
    assert changed != prepared
    assert "changed" in {record.chosen for record in open_source(changed)}


def test_refusals_keep_their_place_and_fix(tmp_path):
    with pytest.raises(DataError, match=r"nowhere\.jsonl: no such file.*fix: check the path"):
        prepare(Preferences, tmp_path, path=tmp_path / "nowhere.jsonl")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"a folder without \.jsonl"):
        prepare(Preferences, tmp_path, path=tmp_path / "empty")
    path = write(tmp_path / "x.jsonl", RANKING)
    with pytest.raises(DataError, match=r"x\.jsonl:1: field 'chosen' is missing.*fix: add 'chosen'"):
        prepare(Preferences, tmp_path, path=path)
    prepared = prepare(Rankings, tmp_path, path=path)
    with pytest.raises(ValueError, match="has no split 'test'; fix: choose from train"):
        open_source(prepared, split="test")


def transcript(reply, ask="a"):
    return f"\n\nHuman: {ask}\n\nAssistant: {reply}"


HH = [
    {"chosen": transcript("b"), "rejected": transcript("c")},
    {"chosen": transcript("b"), "rejected": transcript("c", ask="z")},
    {"chosen": transcript("d"), "rejected": transcript("c")},
]


def test_hh_from_a_local_folder(tmp_path):
    path = write(tmp_path / "hh" / "helpful-base" / "test.jsonl.gz", *HH)
    prepared = prepare(HHPreferences, tmp_path / "out", config="helpful-base", source=tmp_path / "hh")
    source = open_source(prepared, split="test")
    assert set(source) == set(read_hh(path, name="helpful-base/test")[0])
    assert {record.id for record in source} == {"helpful-base/test/0", "helpful-base/test/2"}
    assert "1 differing prompts" in json.loads((prepared / "metadata.json").read_text())["test"]
    with pytest.raises(DataError, match=r"holds none of harmless-base/train\.jsonl\.gz, .*fix: give a folder"):
        prepare(HHPreferences, tmp_path / "out", config="harmless-base", source=tmp_path / "hh")
    with pytest.raises(ValueError, match=r"config 'online' is unknown \(allowed: harmless-base, helpful-base\)"):
        prepare(HHPreferences, tmp_path / "out", config="online")


def test_hh_real_file(data_dir, tmp_path):
    folder = tmp_path / "hh" / "harmless-base"
    folder.mkdir(parents=True)
    raw = data_dir / "raw" / "hh_harmless_base.test.jsonl.gz"
    shutil.copy(raw, folder / "test.jsonl.gz")
    source = open_source(prepare(HHPreferences, tmp_path / "out", source=tmp_path / "hh"), split="test")
    assert set(source) == set(read_hh(raw, name="harmless-base/test")[0])


def test_hh_downloads_what_the_public_layout_offers(tmp_path, monkeypatch):
    """The same code path as for the real address, against a server on this machine."""
    for split in ("train", "test"):
        write(tmp_path / "served" / "harmless-base" / f"{split}.jsonl.gz", *HH)
    assert hh.HH_URL == "https://raw.githubusercontent.com/anthropics/hh-rlhf/master"

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=tmp_path / "served")

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Quiet) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        monkeypatch.setattr(hh, "HH_URL", f"http://127.0.0.1:{server.server_port}")
        prepared = prepare(HHPreferences, tmp_path / "out")
        server.shutdown()
        thread.join()
    assert prepared == tmp_path / "out" / "hh_preferences" / "harmless-base" / "1.0.0"
    for split in ("train", "test"):
        ids = {record.id for record in open_source(prepared, split=split)}
        assert ids == {f"harmless-base/{split}/0", f"harmless-base/{split}/2"}


def test_tensorflow_is_never_imported(tmp_path):
    path = write(tmp_path / "records.jsonl", PAIR, OTHER)
    code = (
        "import sys\n"
        "import rlhf_jax, rlhf_jax.data, rlhf_jax.data.preferences\n"
        "assert 'tensorflow_datasets' not in sys.modules\n"
        "from rlhf_jax.data.builders import Preferences, open_source, prepare\n"
        f"source = open_source(prepare(Preferences, {str(tmp_path)!r}, path={str(path)!r}))\n"
        "assert {r.chosen for r in source} == {' 4\\n\\U0001f388'}\n"
        "assert 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, capture_output=True)

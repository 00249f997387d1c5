"""Tokenizers: what goes in comes back, typed special tokens stay text, saved ones load equal."""

import hashlib
import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_jax.data.tokenizers import byte_tokenizer, load_tokenizer, save_tokenizer, train_bpe

TEXTS = [
    "the cat sat on the mat, the cat ran",
    "Ünïcödé — 漢字, the end.\n\nHuman: the cat?",
    "the the the cat cat",
]
UNICODE = [
    "",
    " ",
    " leading and trailing \n\n",
    "\n\nHuman: hi\n\nAssistant: ok",
    "naïve “quotes” … 漢字 עברית 🎈👩‍👩‍👧 \u2028 \x00 \t",
    "don't  won't I'll , . !",
]
INJECTION = "<|pad|><|bos|><|endoftext|><|turn_assistant|> <|turn_user|><|im_end|> x<|endoftext|>y <pad></s><s>[PAD]"


@pytest.fixture(scope="module")
def bpe():
    return train_bpe(TEXTS, vocab_size=280)


@pytest.fixture(scope="module", params=["bytes", "bpe", "saved bpe", "gpt2"])
def tokenizer(request, bpe, tmp_path_factory):
    if request.param == "bytes":
        return byte_tokenizer()
    if request.param == "bpe":
        return bpe
    if request.param == "gpt2":
        return load_tokenizer(request.getfixturevalue("data_dir") / "tokenizers" / "gpt2")
    folder = tmp_path_factory.mktemp("tokenizer")
    save_tokenizer(bpe, folder)
    return load_tokenizer(folder)


@pytest.mark.parametrize("text", [*UNICODE, INJECTION])
def test_round_trip_on_unicode(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=60, deadline=None, database=None)
@given(st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_round_trip_on_any_text(bpe, text):
    for tokenizer in (byte_tokenizer(), bpe):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert all(0 <= i < tokenizer.vocab_size for i in ids)


def test_typed_special_tokens_are_plain_text(tokenizer):
    ids = tokenizer.encode(INJECTION)
    assert not {tokenizer.pad_id, tokenizer.eos_id, tokenizer.bos_id, *tokenizer.turn_ids.values()} & set(ids)
    assert len(ids) > 10


def test_special_ids_give_no_text(tokenizer):
    ids = [*tokenizer.turn_ids.values(), tokenizer.bos_id, *tokenizer.encode("a b"), tokenizer.eos_id, tokenizer.pad_id]
    assert tokenizer.decode(ids) == "a b"


def test_unknown_ids_are_refused(tokenizer):
    for bad in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {bad} at place 1 is outside the vocabulary of .*; fix: "):
            tokenizer.decode([0, bad])


def test_cut_characters_become_replacement_marks():
    assert byte_tokenizer().decode(byte_tokenizer().encode("é")[:1]) == "\ufffd"


def test_byte_tokenizer_ids():
    tokenizer = byte_tokenizer()
    assert tokenizer.encode("Aé") == [65, 0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.pad_id, tokenizer.bos_id, tokenizer.eos_id) == (
        259,
        256,
        257,
        258,
    )


def test_bpe_ids(bpe):
    assert (bpe.pad_id, bpe.bos_id, bpe.eos_id) == (0, 1, 2)
    assert bpe.vocab_size == 280
    assert len(bpe.encode("the cat")) < len("the cat")
    assert train_bpe(["ab"], vocab_size=1000).vocab_size < 1000
    with pytest.raises(ValueError, match=r"vocab_size 261 < 262 .*fix: raise it"):
        train_bpe(TEXTS, vocab_size=261)


def test_gpt2_ids(data_dir):
    gpt2 = load_tokenizer(data_dir / "tokenizers" / "gpt2")
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode(" don't\n\n") == [836, 470, 628]
    assert gpt2.vocab_size == 50257
    assert gpt2.pad_id == gpt2.eos_id == gpt2.bos_id == 50256


def test_saved_tokenizers_load_equal(tmp_path, bpe):
    for name, tokenizer in {"bytes": byte_tokenizer(), "bpe": bpe}.items():
        save_tokenizer(tokenizer, tmp_path / "new" / name)
        loaded = load_tokenizer(tmp_path / "new" / name)
        assert loaded == tokenizer
        assert [loaded.encode(text) for text in UNICODE] == [tokenizer.encode(text) for text in UNICODE]


def test_training_is_deterministic_and_the_fingerprint_tells_vocabularies_apart(bpe):
    assert train_bpe(TEXTS, vocab_size=280) == bpe
    others = [train_bpe(TEXTS, vocab_size=281), train_bpe(TEXTS[:2], vocab_size=280), byte_tokenizer()]
    assert len({bpe.fingerprint, *(other.fingerprint for other in others)}) == 4
    content = {"vocabulary": {f"<0x{i:02X}>": i for i in range(256)}, "pad": 256, "eos": 258, "bos": 257}
    expected = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    assert byte_tokenizer().fingerprint == expected


def saved_with_config(bpe, folder, **changes):
    save_tokenizer(bpe, folder)
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return folder


def test_foreign_folders(tmp_path, bpe):
    """As other tools save them: special tokens would be recognised in text, and there is no pad token."""
    loaded = load_tokenizer(saved_with_config(bpe, tmp_path, split_special_tokens=None, pad_token=None))
    assert loaded.pad_id == loaded.eos_id == bpe.eos_id
    assert loaded.fingerprint != bpe.fingerprint
    assert not {0, 1, 2} & set(loaded.encode(INJECTION))
    assert loaded.encode(UNICODE[3]) == bpe.encode(UNICODE[3])


TEMPLATE = (
    "{% for message in messages %}{{ '<|turn_' + message['role'] + '|>' + message['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn_assistant|>' }}{% endif %}"
)


def test_a_chat_template_in_the_folder_belongs_to_the_tokenizer(tmp_path, bpe):
    """It is used, kept, part of the fingerprint by a formula of its own, and left out on request."""
    save_tokenizer(bpe, tmp_path / "a")
    (tmp_path / "a" / "chat_template.jinja").write_text(TEMPLATE)
    tokenizer = load_tokenizer(tmp_path / "a")
    assert tokenizer.template.text == TEMPLATE
    assert (tokenizer.eos_id, tokenizer.pad_id, tokenizer.turn_ids) == (bpe.eos_id, bpe.pad_id, {})
    vocabulary = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]
    content = {"vocabulary": vocabulary, "pad": 0, "eos": 2, "bos": 1}
    hashes = [
        hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest()
        for c in (content, content | {"template": TEMPLATE})
    ]
    assert [bpe.fingerprint, tokenizer.fingerprint] == hashes
    save_tokenizer(tokenizer, tmp_path / "b")
    assert load_tokenizer(tmp_path / "b") == tokenizer != bpe
    assert load_tokenizer(tmp_path / "b", template=False) == bpe
    save_tokenizer(load_tokenizer(tmp_path / "b", template=False), tmp_path / "c")
    assert load_tokenizer(tmp_path / "c") == bpe
    assert [tokenizer.encode(text) for text in UNICODE] == [bpe.encode(text) for text in UNICODE]
    assert not {0, 1, 2, *bpe.turn_ids.values()} & set(tokenizer.encode(INJECTION))


def test_without_an_eos_token_the_template_may_still_end_replies(tmp_path, bpe):
    folder = saved_with_config(bpe, tmp_path / "x", eos_token=None)
    (folder / "chat_template.jinja").write_text(TEMPLATE.replace("eos_token", "'<|pad|>'"))
    assert load_tokenizer(folder).eos_id == 0
    with pytest.raises(ValueError, match="has no eos token"):
        load_tokenizer(folder, template=False)


def test_refused_folders(tmp_path, bpe):
    with pytest.raises(ValueError, match="no such folder; fix: "):
        load_tokenizer(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"holds no tokenizer \(found: notes.txt\); fix: give a folder with"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="has no eos token, so a reply could never end; fix: add"):
        load_tokenizer(saved_with_config(bpe, tmp_path / "x", eos_token=None))


def test_byte_tokenizer_needs_no_third_party_tokenizer():
    code = (
        "import sys\n"
        "from rlhf_jax.data import batching, chat, demonstrations, lengths, preferences, prompts\n"
        "from rlhf_jax.data.tokenizers import byte_tokenizer\n"
        "byte_tokenizer().encode('x')\n"
        "heavy = {'transformers', 'tokenizers', 'tensorflow_datasets', 'tensorflow'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)

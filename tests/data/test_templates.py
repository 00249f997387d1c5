"""Chat templates of nine families, each with a small tokenizer of its kind: what is written, learned, kept out and refused.

The templates are written here in the manner of the families and marked with `{% generation %}`, which the tokenizers
under test never see: the ids and the mask that `transformers` gives for the marked ones are the independent answer.
"""

import json
import random
import re
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from rlhf_jax.data import templates
from rlhf_jax.data.chat import (
    decode_completion,
    encode_completion,
    encode_dialogue,
    encode_prompt,
)
from rlhf_jax.data.records import Message
from rlhf_jax.data.tokenizers import load_tokenizer, save_tokenizer

# --- the families -------------------------------------------------------------------------

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}"
    "{% if messages[0]['role'] == 'system' %}{% set about = messages[0]['content'] | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set about = '' %}{% endif %}"
    "{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' + about + '<|eot_id|>' }}"
    "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}"
    "{% else %}{{ message['content'] | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
IN_TURNS = (
    "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate user/assistant') }}{% endif %}"
)
MISTRAL_V1 = (  # [INST] is text; a space after each end
    "{{ bos_token }}" + IN_TURNS + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% else %}{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ ' ' }}{% endif %}{% endfor %}"
)
MISTRAL_V3 = (  # [INST] is a special token
    "{{ bos_token }}" + IN_TURNS + "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + '[/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] + eos_token }}{% endgeneration %}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + IN_TURNS
    + "{% if message['role'] == 'assistant' %}{{ '<start_of_turn>model\n' }}"
    "{% generation %}{{ message['content'] | trim + '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<start_of_turn>user\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (  # <|user|> is text
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + eos_token + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
PHI3 = (  # markers built from the role, which swallow the white space behind them
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + '<|end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
QWEN3 = (  # thinking only in the replies after the last question
    "{% set ns = namespace(last=0) %}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{% set ns.last = loop.index0 %}{% endif %}{% endfor %}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}{% if message['role'] == 'assistant' %}{% generation %}"
    "{% set answer = message['content'].split('</think>')[-1].lstrip('\n') %}{% set thought = '' %}"
    "{% if '</think>' in message['content'] %}"
    "{% set thought = message['content'].split('</think>')[0].split('<think>')[-1].strip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last %}{{ '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}"
    "{{ answer + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ message['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (  # the system's text stands in the first question
    "{% if messages[0]['role'] == 'system' %}{% set about = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set about = '' %}{% endif %}"
    + IN_TURNS
    + "{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + (about if loop.index0 == 0 else '') + message['content'] | trim + ' [/INST]' }}"
    "{% else %}{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}{% endif %}"
    "{% endfor %}"
)

WORDS = "the cat sat on a mat hello world yes no you are so very well thanks now then here user assistant model system"
CORPUS = [
    WORDS,
    WORDS.title(),
    f"\n\n{WORDS}\n",
    "don't I'll 12 345, 6. (why?) [x] <y> | é ü 漢字 INST Today Date: Jul",
] * 3
CORPUS += ["x\n\n\ny"] * 20
LLAMA3_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Llama 3 and Qwen cut a text before they merge."""


def byte_level():
    backend = Backend(models.BPE())
    cut = pre_tokenizers.Split(LLAMA3_WORDS, "isolated")
    letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([cut, letters])
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def sentence_piece(*, prefix):
    """Unigram pieces with `▁` for spaces and bytes for the rest; with `prefix`, a `▁` before the first word of a text."""
    pieces = [("<unk>", 0.0), *((f"<0x{i:02X}>", -20.0) for i in range(256))]
    letters = sorted(set("".join(CORPUS)) - set(" \né漢"))
    pieces += [("▁", -4.0), *((letter, -6.0) for letter in letters)]
    for word in {word for text in CORPUS for word in text.split() if word.isalpha() and word.isascii() and word[1:]}:
        pieces += [(word, -8.0), ("▁" + word, -7.0)]
    backend = Backend(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    decoder = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        decoder.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = normalizers.Replace(" ", "▁")
    backend.decoder = decoders.Sequence(decoder)
    return backend


def merges_with_bytes():
    """Byte pairs, `▁` for spaces, bytes for the rest, and a `▁` at the start and behind each special token."""
    trained = Backend(models.BPE(unk_token="<unk>"))
    spaces = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    trained.normalizer = normalizers.Sequence(spaces)
    trained.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    tokens = ["<unk>", *(f"<0x{i:02X}>" for i in range(256))]
    texts = [text.replace("漢字", "").replace("é", "") for text in CORPUS]
    trained.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=400, special_tokens=tokens, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    merges = [tuple(pair) for pair in model["merges"]]
    backend = Backend(models.BPE(model["vocab"], merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    backend.normalizer = normalizers.Sequence(spaces)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return backend


def special(*tokens, **options):
    return [AddedToken(token, special=True, normalized=False, **options) for token in tokens]


def plain(*tokens):
    return [AddedToken(token, special=False, normalized=False) for token in tokens]


SPIECE = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
FAMILIES = {
    "chatml": (CHATML, byte_level, special("<|im_start|>", "<|im_end|>"), {"eos_token": "<|im_end|>"}, "<|im_end|>"),
    "llama3": (
        LLAMA3,
        byte_level,
        special("<|begin|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos_token": "<|begin|>", "eos_token": "<|end_of_text|>"},
        "<|eot_id|>",
    ),
    "mistral v0.1": (MISTRAL_V1, lambda: sentence_piece(prefix=True), special("<s>", "</s>"), SPIECE, "</s>"),
    "mistral v0.3": (
        MISTRAL_V3,
        lambda: sentence_piece(prefix=True),
        special("<s>", "</s>", "[INST]", "[/INST]"),
        SPIECE,
        "</s>",
    ),
    "gemma": (
        GEMMA,
        lambda: sentence_piece(prefix=False),
        special("<bos>", "<eos>", "<pad>", "<start_of_turn>", "<end_of_turn>"),
        {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>", "unk_token": "<unk>"},
        "<end_of_turn>",
    ),
    "zephyr": (ZEPHYR, lambda: sentence_piece(prefix=True), special("<s>", "</s>"), SPIECE, "</s>"),
    "phi3": (
        PHI3,
        byte_level,
        special("<|endoftext|>")
        + special("<|end|>", "<|assistant|>", rstrip=True)
        + [AddedToken(token, special=False, normalized=False, rstrip=True) for token in ("<|user|>", "<|system|>")],
        {"eos_token": "<|endoftext|>"},
        "<|end|>",
    ),
    "qwen3": (
        QWEN3,
        byte_level,
        special("<|endoftext|>", "<|im_start|>", "<|im_end|>") + plain("<think>", "</think>", "<tool_call>"),
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"},
        "<|im_end|>",
    ),
    "llama2": (LLAMA2, merges_with_bytes, special("<s>", "</s>"), SPIECE, "</s>"),
}
"""Template, tokenizer without its added tokens, these, the names of the special ones, and what ends a reply."""

NO_SYSTEM = ("gemma", "mistral v0.1", "mistral v0.3")
TRIMS = ("llama2", "llama3", "gemma", "phi3", "qwen3")
"""They drop white space around a reply, or before it."""


def unmarked(template):
    return re.sub(r"{% (end)?generation %}", "", template)


def folder_of(folder, template, backend, added, names):
    backend.add_tokens(added)
    source = PreTrainedTokenizerFast(tokenizer_object=backend, clean_up_tokenization_spaces=False, **names)
    source.chat_template = unmarked(template)
    source.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def families(tmp_path_factory):
    def build(name):
        marked, backend, added, names, end = FAMILIES[name]
        folder = folder_of(tmp_path_factory.mktemp("family"), marked, backend(), added, names)
        source = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        return SimpleNamespace(
            name=name, tokenizer=load_tokenizer(folder), source=source, marked=marked, end=end, folder=folder
        )

    return {name: build(name) for name in FAMILIES}


@pytest.fixture(scope="module", params=FAMILIES)
def family(request, families):
    return families[request.param]


def whole(family, messages, **options):
    """What `transformers` makes of the whole dialogue, in one string."""
    dialogue = [{"role": message.role, "content": message.content} for message in messages]
    options = {"date_string": templates.DATE, "return_dict": False} | options
    return family.source.apply_chat_template(dialogue, **options)


# --- dialogues ----------------------------------------------------------------------------

NICE = [
    *WORDS.split(),
    "don't",
    "12",
    "345",
    "é",
    "ü!",
    "漢字",
    "(why?)",
    "x\ny",
    "so.\n\n1",
    "b  c",
    "|",
    "a<b>c",
    "🎈",
]


def nice_text(rng):
    """Any text that no template trims and whose ends no tokenizer joins with what stands beside it."""
    return " ".join([rng.choice(WORDS.split()), *rng.choices(NICE, k=rng.randrange(6)), rng.choice(WORDS.split())])


def dialogues(family, count, text=nice_text):
    """Dialogues of 1 to 3 replies, all ending in one; with a system's text where the family has it."""
    rng = random.Random(family.name)
    for _ in range(count):
        roles = ["user", "assistant"] * rng.randrange(1, 4)
        roles = ["system", *roles] if family.name not in NO_SYSTEM and rng.random() < 0.5 else roles
        yield [Message(role, text(rng)) for role in roles]


def test_prompt_and_completion_are_the_ids_of_the_whole_dialogue(family):
    for messages in dialogues(family, 30):
        expected = tuple(whole(family, messages))
        prompt = encode_prompt(family.tokenizer, messages[:-1])
        assert prompt == tuple(whole(family, messages[:-1], add_generation_prompt=True))
        ids = prompt + encode_completion(family.tokenizer, messages[-1].content)
        assert ids == expected[: len(ids)]
        assert family.tokenizer.decode(expected[len(ids) :]).strip() == ""


def test_the_mask_is_true_on_replies_and_their_ends_alone(family):
    """Against the mask of `transformers`, which comes from places in the text; and read back run by run."""
    for messages in dialogues(family, 30):
        ids, mask = encode_dialogue(family.tokenizer, messages)
        options = {"chat_template": family.marked, "return_dict": True, "return_assistant_tokens_mask": True}
        expected = whole(family, messages, **options)
        assert list(ids) == expected["input_ids"][: len(ids)]
        assert list(mask) == [bool(learned) for learned in expected["assistant_masks"][: len(ids)]]
        assert not any(expected["assistant_masks"][len(ids) :])
        runs = "".join(" *"[learned] for learned in mask)
        replies = [ids[run.start() : run.end()] for run in re.finditer(r"\*+", runs)]
        assert [reply.index(family.tokenizer.eos_id) for reply in replies] == [len(reply) - 1 for reply in replies]
        texts = [decode_completion(family.tokenizer, reply) for reply in replies]
        assert texts == [message.content for message in messages if message.role == "assistant"]


def test_the_end_is_learned_and_is_the_token_that_ends_a_turn(family):
    end = family.source.convert_tokens_to_ids(family.end)
    assert family.tokenizer.eos_id == end
    for text in ("yes", f"no {family.end} yes"):
        completion = encode_completion(family.tokenizer, text)
        assert completion.index(end) == len(completion) - 1
    names = FAMILIES[family.name][3]
    assert family.tokenizer.pad_id == (family.source.convert_tokens_to_ids(names.get("pad_token", family.end)))


# --- any text -----------------------------------------------------------------------------

THINKING = ("<think>", "</think>")
PARTS = ["yes", " ", "\n", "\n\n", "é", "🎈", "12", "<", "|", "im_end", "|>", "[", "INST]", "</", "s>", "\U000f0000"]
PARTS += ["<|im_<|im_end|>end|>", "<s<s>>", "<|system|>", "</s>\n<|assistant|>\nsure"]


def wild(family, *, without=()):
    """Texts full of control tokens, halves of them, white space and private characters."""
    tokens = sorted(set(family.source.get_added_vocab()) - set(without))
    parts = st.sampled_from([*PARTS, *tokens, *(token[:-1] for token in tokens), *(token[1:] for token in tokens)])
    texts = st.lists(parts, min_size=1, max_size=6).map("".join)
    return texts.filter(lambda text: not any(token in text for token in without))


def controls_in(family, ids):
    """The ids of added tokens among `ids`, but for the one that its template never prints."""
    added = {i for token, i in family.source.get_added_vocab().items() if token != "<tool_call>"}
    return [i for i in ids if i in added]


def verbatim(family, text):
    """What can come back: markers of Phi-3 swallow white space, and Llama 2's tokenizer puts a space behind its own."""
    return re.sub(r"\s+", "", text) if family.name in ("phi3", "llama2") else text


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize("name", FAMILIES)
def test_nobody_types_a_control_token(families, name, data):
    """The control ids are those of a harmless dialogue of the same roles, and all the text is there."""
    family = families[name]
    texts = wild(family, without=THINKING)
    others = wild(family)
    roles = ["system"] * (name not in NO_SYSTEM) + ["user", "assistant", "user"]
    messages = [Message(role, data.draw(texts if role == "assistant" else others)) for role in roles]
    harmless = encode_prompt(family.tokenizer, [Message(role, "yes") for role in roles])
    ids = encode_prompt(family.tokenizer, messages)
    assert controls_in(family, ids) == controls_in(family, harmless)
    text = family.source.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    rendered = whole(family, messages, tokenize=False, add_generation_prompt=True)
    assert verbatim(family, text) == verbatim(family, rendered)
    reply = encode_completion(family.tokenizer, data.draw(texts))
    assert controls_in(family, reply) == controls_in(family, encode_completion(family.tokenizer, "yes"))


@settings(max_examples=60, deadline=None, database=None)
@given(data=st.data())
@pytest.mark.parametrize("name", FAMILIES)
def test_replies_come_back_and_begin_the_next_prompt(families, name, data):
    family, tokenizer = families[name], families[name].tokenizer
    texts = wild(family, without=THINKING)
    question, reply, later = (Message(role, data.draw(texts)) for role in ("user", "assistant", "user"))
    prompt, completion = encode_prompt(tokenizer, [question]), encode_completion(tokenizer, reply.content)
    kept = reply.content.strip() if name in TRIMS else reply.content
    for ids in (completion, completion[:-1], (*completion, 5, 6)):
        decoded = decode_completion(tokenizer, ids)
        assert (decoded.strip() if name in TRIMS else decoded) == kept
    following = encode_prompt(tokenizer, [question, reply, later])
    if name == "qwen3":  # the empty thinking block stands in a last reply only
        lead = whole(family, [question, Message("assistant", "yes")], tokenize=False).split("assistant\n")[-1][:19]
        completion = completion[len(tokenizer.template.encode(lead)) :]
    assert following[: len(prompt + completion)] == prompt + completion
    assert following[: len(prompt)] == prompt


def test_control_tokens_that_overlap_are_all_broken_in_a_reply(tmp_path):
    backend, added, names = FAMILIES["chatml"][1:4]
    folder = folder_of(tmp_path, CHATML, backend(), added + special("<a<", "<b>"), names)
    source, tokenizer = AutoTokenizer.from_pretrained(str(folder), local_files_only=True), load_tokenizer(folder)
    completion = encode_completion(tokenizer, "x<a<b>y")
    assert not set(source.convert_tokens_to_ids(["<a<", "<b>"])) & set(completion)
    assert decode_completion(tokenizer, completion) == "x<a<b>y"


# --- thinking -----------------------------------------------------------------------------


def test_thinking_is_learned_in_the_last_reply_and_gone_from_the_history(families):
    family = families["qwen3"]
    tokenizer, think = family.tokenizer, family.source.convert_tokens_to_ids(list(THINKING))
    thought = "<think>\nthe cat, so no\n</think>\n\nno"
    messages = [Message("user", "so <think>?"), Message("assistant", thought)]
    completion = encode_completion(tokenizer, thought)
    assert [i for i in completion if i in think] == think
    assert decode_completion(tokenizer, completion) == thought
    assert not set(think) & set(encode_prompt(tokenizer, messages[:1]))
    assert encode_dialogue(tokenizer, messages).ids == encode_prompt(tokenizer, messages[:1]) + completion
    later = [*messages, Message("user", "why")]
    short = [messages[0], Message("assistant", "no"), Message("user", "why")]
    assert encode_prompt(tokenizer, later) == encode_prompt(tokenizer, short)
    with pytest.raises(ValueError, match=r"message 1 \(assistant\): .* drops 'the cat, so no' of it.* fix: encode one"):
        encode_dialogue(tokenizer, [*later, Message("assistant", "yes")])


# --- where text is cut --------------------------------------------------------------------


def test_a_reply_is_cut_off_its_prompt_in_training_and_in_history_alike(families):
    """The exception that the module's text names: a reply that begins with a newline, behind `assistant` and a newline."""
    family = families["chatml"]
    messages = [Message("user", "hello"), Message("assistant", "\n\nyes")]
    ids = encode_prompt(family.tokenizer, messages[:1]) + encode_completion(family.tokenizer, messages[1].content)
    assert family.source.decode(ids) == whole(family, messages, tokenize=False).removesuffix("\n")
    assert list(ids) != whole(family, messages)[:-1]
    assert encode_dialogue(family.tokenizer, messages).ids == ids
    later = encode_prompt(family.tokenizer, [*messages, Message("user", "so")])
    assert later[: len(ids)] == ids


def test_no_space_is_put_before_the_first_word_of_a_reply(families):
    """SentencePiece begins a text with a space; a reply is no beginning."""
    tokens = {name: families[name].source.convert_ids_to_tokens for name in ("mistral v0.1", "mistral v0.3", "zephyr")}
    starts = {name: to(encode_completion(families[name].tokenizer, "yes")[0]) for name, to in tokens.items()}
    assert starts == {"mistral v0.1": "yes", "mistral v0.3": "▁yes", "zephyr": "yes"}


def test_added_words_stay_words_and_the_longest_marker_counts(tmp_path):
    """As in Gemma's and Phi's vocabularies: words and white space among the added tokens, one token beginning another."""
    backend, added, names = FAMILIES["chatml"][1:4]
    added = added + plain("user", "\n\n") + special("<|im_end|>\n")
    folder = folder_of(tmp_path, CHATML, backend(), added, names)
    family = SimpleNamespace(source=AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
    messages = [Message("user", "the user\n\nuser"), Message("assistant", "yes user"), Message("user", "so")]
    tokenizer = load_tokenizer(folder)
    assert encode_prompt(tokenizer, messages) == tuple(whole(family, messages, add_generation_prompt=True))
    assert tokenizer.eos_id == family.source.convert_tokens_to_ids("<|im_end|>\n")


# --- unknown characters -------------------------------------------------------------------


def letters_alone(folder, **names):
    letters = "<|>/_ \n0123456789abcdefghijklmnopqrstuvwxyz"
    backend = Backend(models.BPE({"<unk>": 0} | {c: i for i, c in enumerate(letters, 1)}, [], unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    names = {"eos_token": "<|im_end|>", "unk_token": "<unk>"} | names
    return load_tokenizer(
        folder_of(folder, CHATML, backend, special("<unk>", "<|im_start|>", "<|im_end|>", "<|pad|>"), names)
    )


def test_characters_outside_the_vocabulary_are_unknown_and_typed_ones_stay_text(tmp_path):
    tokenizer = letters_alone(tmp_path)
    assert encode_prompt(tokenizer, [Message("user", "a ß")]).count(0) == 1
    assert encode_completion(tokenizer, "a ß")[:3] == (*tokenizer.encode("a "), 0)
    typed = encode_prompt(tokenizer, [Message("user", "a<unk>")])
    assert 0 not in typed
    assert tokenizer.decode(typed) == "user\na<unk>\nassistant\n"


def test_an_unknown_character_is_refused_where_its_id_is_a_control(tmp_path):
    tokenizer = letters_alone(tmp_path, pad_token="<unk>")
    with pytest.raises(
        ValueError, match=r"but it encodes to \[.*0.*\]: a typed one was recognised.*fix: drop the record"
    ):
        encode_prompt(tokenizer, [Message("user", "a ß")])


# --- refusals -----------------------------------------------------------------------------


def load_with(folder, template):
    """ChatML's tokenizer with another template."""
    backend, added, names = FAMILIES["chatml"][1:4]
    return load_tokenizer(folder_of(folder, template, backend(), added, names))


TODAY = "{{ 'Today is ' + strftime_now('%d %b %Y') + '\n' }}"
LAST_TWO = CHATML.replace("in messages", "in messages[-2:]")
TWICE = CHATML.replace("{{ message['content'] + '<|im_end|>' }}{% endif %}", "{{ message['content'] * 2 }}{% endif %}")
NO_END = CHATML.replace("<|im_end|>", "")
OTHER_END = CHATML.replace(
    "{% endgeneration %}", "{% if loop.last %}{{ eos_token }}{% endif %}{% endgeneration %}"
).replace("{% generation %}{{ message['content'] + '<|im_end|>' }}", "{% generation %}{{ message['content'] }}")
OTHER_OPENING = CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n\n' }}")
NO_OPENING = CHATML.split("{% if add_generation_prompt %}")[0]


@pytest.mark.parametrize(
    ("template", "fault"),
    [
        (TODAY + CHATML, "prints today's date, so ids would depend on the day; fix: replace strftime_now"),
        ("{{ date_string }}" + TODAY + CHATML, "refuses the dialogue .roles: user.: .* not callable"),
        (LAST_TWO, r"does not print 3 messages once and in order, but .*; fix: print each message"),
        (TWICE, "does not print 1 messages once and in order"),
        (CHATML.replace("message['content']", "'hi'"), "does not print 1 messages"),
        (NO_END, "no one special token ends every reply, so the end could not be learned; fix: print eos_token"),
        (CHATML.replace("{% generation %}", "{{ '<|im_end|>' }}"), "no one special token ends every reply"),
        (OTHER_END, "no one special token ends every reply"),
        (
            OTHER_OPENING,
            "generation prompt .* is not how it opens the turn .* training and sampling would differ; fix: ",
        ),
        (NO_OPENING, "generation prompt .* is not how it opens the turn"),
        ("{{ raise_exception('no chat') }}", "refuses the dialogue .roles: user.: no chat; nothing was encoded"),
        ("{{ messages[0]['content'] + tools }}", "refuses the dialogue"),
        ("{% for message in messages %}", "refuses the dialogue"),
    ],
    ids=lambda value: None,
)
def test_templates_that_cannot_be_learned_are_refused(tmp_path, template, fault):
    with pytest.raises(ValueError, match=f"{re.escape(str(tmp_path))}: chat template: .*{fault}.*template=False"):
        load_with(tmp_path, template)
    plain_text = load_tokenizer(tmp_path, template=False)
    assert plain_text.template is None
    assert encode_prompt(plain_text, [Message("user", "hi")]) == tuple(plain_text.encode("\n\nHuman: hi\n\nAssistant:"))


def test_roles_that_a_template_refuses_or_drops(families, tmp_path):
    hello = Message("user", "hello")
    for name in NO_SYSTEM:
        with pytest.raises(
            ValueError, match=r"refuses the dialogue \(roles: system, user\): .*; nothing was encoded; fix: "
        ):
            encode_prompt(families[name].tokenizer, [Message("system", "be brief"), hello])
        with pytest.raises(ValueError, match=r"refuses the dialogue .*must alternate"):
            encode_prompt(families[name].tokenizer, [hello, hello])
    silent = CHATML.replace("in messages %}", "in messages if message['role'] != 'system' %}")
    with pytest.raises(
        ValueError, match=r"prints message 0 \(system\) 0 times in a dialogue of roles system, user; .*fix: "
    ):
        encode_prompt(load_with(tmp_path, silent), [Message("system", "be brief"), hello])
    mute = CHATML.replace("if add_generation_prompt", "if add_generation_prompt and messages[-1]['role'] == 'user'")
    with pytest.raises(ValueError, match="does not let the assistant speak after the system's message; nothing was"):
        encode_prompt(load_with(tmp_path / "mute", mute), [hello, Message("system", "be brief")])
    for encode in (encode_prompt, encode_dialogue):
        with pytest.raises(ValueError, match="unknown role 'bot'"):
            encode(families["chatml"].tokenizer, [Message("bot", "x"), Message("assistant", "yes")])


def test_dialogues_that_end_otherwise_are_refused(families):
    tokenizer, hello, yes = families["chatml"].tokenizer, Message("user", "hello"), Message("assistant", "yes")
    with pytest.raises(ValueError, match="the dialogue has no message; nothing was encoded; fix: "):
        encode_prompt(tokenizer, [])
    with pytest.raises(ValueError, match=r"the last message of the prompt is the assistant's; .*fix: end the prompt"):
        encode_prompt(tokenizer, [hello, yes])
    for messages in ([], [hello], [hello, yes, hello]):
        with pytest.raises(ValueError, match="does not end in a reply of the assistant; it was not encoded; fix: "):
            encode_dialogue(tokenizer, messages)


def test_contents_that_a_template_changes_are_refused(tmp_path):
    shouting = CHATML.replace(
        "{{ message['content'] + '<|im_end|>' }}{% endif", "{{ message['content'] | upper + '<|im_end|>' }}{% endif"
    )
    with pytest.raises(ValueError, match="does not print 1 messages"):
        load_with(tmp_path / "a", shouting)
    cut = CHATML.replace("message['content'] +", "message['content'].split('#')[0] +")
    tokenizer, hello = load_with(tmp_path / "b", cut), Message("user", "hello")
    with pytest.raises(ValueError, match=r"message 0 \(user\): the chat template does not print it as it is \('a#b'\)"):
        encode_prompt(tokenizer, [Message("user", "a#b")])
    with pytest.raises(ValueError, match="the reply: the chat template drops 'a#b' of it"):
        encode_completion(tokenizer, "a#b")
    for messages in ([Message("user", "a#b"), Message("assistant", "yes")], [hello, Message("assistant", "a#b")]):
        with pytest.raises(ValueError, match=r"message \d .*nothing was encoded; fix: "):
            encode_dialogue(tokenizer, messages)
    endless = CHATML.replace(
        "+ '<|im_end|>' }}{% endgen", "+ ('' if '!' in message['content'] else '<|im_end|>') }}{% endgen"
    )
    with pytest.raises(
        ValueError, match=r"does not end the reply 'no!' in <\|im_end\|>; it was not encoded; fix: leave it"
    ):
        encode_completion(load_with(tmp_path / "c", endless), "no!")


def test_a_history_that_changes_as_the_dialogue_goes_on_is_no_row_and_a_prompt_in_one_piece(families, tmp_path):
    changing = "{{ 'long: ' if messages | length > 2 else '' }}" + CHATML
    tokenizer = load_with(tmp_path, changing)
    texts = ["a", "\n\nb", "c", "\n\nd", "e", "f"]
    messages = [Message(role, text) for role, text in zip(["user", "assistant"] * 3, texts, strict=True)]
    first = encode_prompt(tokenizer, messages[:1]) + encode_completion(tokenizer, messages[1].content)
    assert encode_dialogue(tokenizer, messages[:2]).ids == first
    with pytest.raises(ValueError, match=r"writes what precedes message 1 \(assistant\) otherwise once it is answered"):
        encode_dialogue(tokenizer, messages)
    prompt = whole(families["chatml"], messages[:5], add_generation_prompt=True, chat_template=unmarked(changing))
    assert encode_prompt(tokenizer, messages[:5]) == tuple(prompt)


# --- files --------------------------------------------------------------------------------


def test_templates_are_kept_by_saving_and_told_apart_by_the_fingerprint(family, tmp_path):
    save_tokenizer(family.tokenizer, tmp_path)
    loaded = load_tokenizer(tmp_path)
    assert loaded == family.tokenizer
    assert loaded.template.text == unmarked(family.marked) == family.tokenizer.template.text
    for messages in dialogues(family, 5):
        assert encode_dialogue(loaded, messages) == encode_dialogue(family.tokenizer, messages)
    bare = load_tokenizer(tmp_path, template=False)
    path = tmp_path / "chat_template.jinja"
    path.write_text(path.read_text() + "{# another #}")
    fingerprints = {family.tokenizer.fingerprint, bare.fingerprint, load_tokenizer(tmp_path).fingerprint}
    assert len(fingerprints) == 3


def test_without_its_template_a_tokenizer_writes_plain_text(families, tmp_path):
    family = families["llama3"]
    bare = load_tokenizer(family.folder, template=False)
    assert (bare.template, bare.eos_id) == (None, family.source.eos_token_id)
    assert bare.eos_id != family.tokenizer.eos_id
    messages = [Message("user", "hello")]
    assert encode_prompt(bare, messages) == (bare.bos_id, *bare.encode("\n\nHuman: hello\n\nAssistant:"))
    save_tokenizer(bare, tmp_path)
    assert load_tokenizer(tmp_path) == bare


def test_of_several_templates_the_default_is_used(families, tmp_path):
    family = families["chatml"]
    source = AutoTokenizer.from_pretrained(str(family.folder), local_files_only=True)
    source.chat_template = {"default": unmarked(CHATML), "tool_use": "{{ messages }}"}
    source.save_pretrained(str(tmp_path / "a"))
    loaded = load_tokenizer(tmp_path / "a")
    assert loaded == family.tokenizer
    assert loaded.template.text == unmarked(CHATML)
    assert encode_prompt(loaded, [Message("user", "a")]) == encode_prompt(family.tokenizer, [Message("user", "a")])
    source.chat_template = {"tool_use": unmarked(CHATML)}
    source.save_pretrained(str(tmp_path / "b"))
    with pytest.raises(ValueError, match=r"none is the default \(there are tool_use\); fix: name one 'default'"):
        load_tokenizer(tmp_path / "b")

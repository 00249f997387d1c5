r"""Chat templates of real checkpoints: dialogues as the token ids that the model was trained on.

A template is the jinja text that a tokenizer's folder carries (`chat_template`). It is rendered by `transformers`, in
its sandbox, and never executed otherwise. Four rules hold here.

**Typed special tokens stay text.** Control tokens are all special tokens, and those other added tokens that the
template itself prints (turn markers of some models, `<think>`). In what a user or the system says, the first letter of
each is replaced by a private character before the template sees it; in what the assistant says, only typed special
tokens and user-turn markers are, so that reasoning markers work. The rendering is then cut inside every token so
marked, and both halves are tokenised apart. A count proves it: the control ids are the ones that the template printed.
Turn markers that are no tokens of the vocabulary (Mistral's `[INST]` of 2023, Zephyr's `<|user|>`) are plain text in
training, too, and can be typed like any text.

**A completion** is what the template prints after its generation prompt: the reply, and what it puts before and after
it, up to and including the first special token behind the reply. This token is `Tokenizer.eos_id`: the end is learned.

**Where text is cut.** Prompt and completion are tokenised apart, in training, in sampling and in the history of a
longer dialogue, so that prompt + completion begins the prompt of the next turn. Elsewhere the rendering is one string.
A completion is tokenised as it would be behind the generation prompt. Ids differ from those of the whole string only
where special tokens do not border the reply and both sides would share a token (a reply that begins with a newline
after `assistant\n`), or be cut otherwise together (two newlines before a word, in GPT-2's manner). Nothing adds a bos:
most templates print one.

**Nothing is lost silently.** Every message must come back in the rendering, once. Templates that print today's date
are refused (Llama's `date_string` is fixed to `DATE`), because ids must not depend on the day.
"""

import functools
import itertools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from rlhf_jax.data.records import Message, TokenizedDialogue

DATE = "26 Jul 2024"
"""What templates with a `date_string` print as today: the default of those templates themselves."""

_PRIVATE = range(0xF0000, 0xFFFFD)
_NEUTRAL = ("\n", "a")
"""Texts behind which a piece can be tokenised when the true one would share a token with it."""


@dataclass(frozen=True, eq=False)
class ChatTemplate:
    """How one tokenizer writes dialogues. Made by `read_template`."""

    text: str
    """The jinja text."""
    end: str
    """The special token that ends the assistant's turn."""
    end_id: int
    word: str
    """A user's message that occurs nowhere in `text`."""
    head: str
    """The rendering of `word` alone, up to where the assistant speaks."""
    lead: str
    """What stands before the reply in a decoded completion: an empty thinking block, a space, or nothing."""
    tail: str
    """What stands behind the reply in a decoded completion: nothing, as a rule."""
    controls: Mapping[str, int]
    """Tokens that no user can type, with their ids."""
    spoken: frozenset[str]
    """Those of them that the assistant may write: `<think>`."""
    unknown: str | None
    """The one that also stands for characters outside the vocabulary, if it is no bos, eos or pad token."""
    render: Callable[[Sequence[Message], bool], str]
    """`render(messages, prompt) -> text`; with `prompt`, up to where the assistant speaks. Raises `ValueError`."""
    encode: Callable[[str], list[int]]
    """Text to ids, special tokens recognised and none added."""
    decode: Callable[..., str]
    """`decode(ids, after=ids) -> text` of both."""

    @property
    def opening(self) -> str:
        """What stands between a user's message and the assistant's completion."""
        return self.head.split(self.word)[1]


def read_template(source: Any, *, decode: Callable[..., str]) -> ChatTemplate:
    """The chat template of a `transformers` tokenizer, probed for what it does to a dialogue.

    Raises `ValueError`, naming the tokenizer, where the template opens the assistant's turn otherwise than its
    generation prompt does, ends it in no special token, loses or repeats messages, or prints today's date.
    """
    try:
        return _read_template(source, decode)
    except ValueError as error:
        raise ValueError(
            f"{source.name_or_path}: chat template: {error}; no tokenizer was made; or load it with template=False, "
            "which writes dialogues as plain text"
        ) from error


def encode_prompt(template: ChatTemplate, messages: Sequence[Message]) -> tuple[int, ...]:
    """Ids of the dialogue up to where the assistant speaks: the template with its generation prompt.

    Earlier turns look as the template wants them; some drop the reasoning of earlier replies. Raises `ValueError` when
    the template refuses the dialogue or loses a message, and when the assistant spoke last.
    """
    if not messages or messages[-1].role == "assistant":
        what = "the dialogue has no message" if not messages else "the last message of the prompt is the assistant's"
        raise ValueError(f"{what}; nothing was encoded; fix: end the prompt with a user's message")
    _check_each_kept(template, tuple(message.role for message in messages), True)
    marks, marked = _mark(template, messages)
    text = template.render(marked, True)
    if not text.endswith(template.opening):
        raise ValueError(
            f"the chat template does not let the assistant speak after the {messages[-1].role}'s message; nothing was "
            "encoded; fix: end the prompt with a user's message"
        )
    for i, message in enumerate(marked):
        content = message.content.rpartition("</think>")[2] if message.role == "assistant" else message.content
        _check_part(text, content, f"message {i} ({message.role})")
    spans = _spans(template, marked, text)
    in_order = None not in spans and all(a[1] <= b[0] for a, b in itertools.pairwise(spans))
    return tuple(token for ids, _ in _pieces(template, text, spans if in_order else [], marks) for token in ids)


def encode_completion(template: ChatTemplate, text: str) -> tuple[int, ...]:
    """Ids of a last reply as the template prints it, its end token included.

    Raises `ValueError` when the template drops a part of the reply.
    """
    marks, marked = _mark(template, [Message("user", template.word), Message("assistant", text)])
    rendered = template.render([Message("user", template.word), marked[1]], False)
    end = rendered.find(template.end, len(template.head))
    if not rendered.startswith(template.head) or end < 0:
        raise ValueError(
            f"the chat template does not end the reply {text[:40]!r} in {template.end}; it was not encoded; "
            "fix: leave it out of the data"
        )
    span = rendered[len(template.head) : end + len(template.end)]
    _check_reply(span, marked[1].content, "the reply")
    return tuple(_encode(template, span, marks, (template.opening, *_NEUTRAL)))


def decode_completion(template: ChatTemplate, ids: Sequence[int]) -> str:
    """The reply before the first end token: inverse of `encode_completion`, but for the white space that templates trim."""
    ids = [int(token) for token in ids]
    ids = ids[: ids.index(template.end_id)] if template.end_id in ids else ids
    anchor = template.encode("a")
    text = template.decode(ids, after=anchor).removeprefix(template.decode(anchor))
    return text.removeprefix(template.lead).removesuffix(template.tail)


def encode_dialogue(template: ChatTemplate, messages: Sequence[Message]) -> TokenizedDialogue:
    """Ids of a dialogue up to the end of its last turn, the assistant's; the mask is True on each of its completions.

    Where a template writes an earlier reply otherwise than a last one (an empty thinking block is common), the row
    shows, and the mask covers, what it writes in this dialogue. Raises `ValueError` as `encode_prompt` does, and when
    the template changes the history as the dialogue goes on, or drops a part of a reply.
    """
    _check_each_kept(template, tuple(message.role for message in messages), False)
    marks, marked = _mark(template, messages)
    text = template.render(marked, False)
    spans, replies = _spans(template, marked, text), [i for i, m in enumerate(messages) if m.role == "assistant"]
    place = 0
    for i, span in zip(replies, spans, strict=True):
        if span is None or span[0] < place:
            raise ValueError(
                f"the chat template writes what precedes message {i} (assistant) otherwise once it is answered; the "
                "dialogue was not encoded; fix: encode one demonstration for each reply"
            )
        place = span[1]
        _check_reply(text[slice(*span)], marked[i].content, f"message {i} (assistant)")
    for i, message in enumerate(marked):
        if message.role != "assistant":
            _check_part(text[:place], message.content, f"message {i} ({message.role})")
    pieces = list(_pieces(template, text[:place], spans, marks))
    return TokenizedDialogue(
        tuple(token for ids, _ in pieces for token in ids), tuple(learned for ids, learned in pieces for _ in ids)
    )


def _read_template(source: Any, decode: Callable[..., str]) -> ChatTemplate:
    text = source.chat_template if isinstance(source.chat_template, str) else source.chat_template.get("default")
    if text is None:
        raise ValueError(f"none is the default (there are {', '.join(source.chat_template)}); fix: name one 'default'")
    if "strftime_now" in text and "date_string" not in text:
        raise ValueError(
            "it prints today's date, so ids would depend on the day; "
            "fix: replace strftime_now(...) by a date in chat_template.jinja"
        )
    render = functools.partial(_render, source)
    words = user, reply, later = _words(text, 3)
    messages = [Message("user", user), Message("assistant", reply), Message("user", later)]
    head, full, history = render(messages[:1], True), render(messages[:2], False), render(messages, True)
    _check_probes(head, full, history, words, silent=render(messages[:1], False) == head)
    between, before_system = history.split(reply)[1].split(later)[0], _before_system(render, words)
    special, controls = _controls(source, [text, head, full, history, before_system])
    end = _end_token(special, full[len(head) :].split(reply), between)
    others = "\0".join([head.split(user)[0], between, before_system])
    template = ChatTemplate(
        text=text,
        end=end,
        end_id=controls[end],
        word=user,
        head=head,
        lead="",
        tail="",
        controls=controls,
        unknown=None
        if source.unk_token in (source.bos_token, source.eos_token, source.pad_token)
        else source.unk_token,
        spoken=frozenset(token for token in set(controls) - set(special) if token not in others),
        render=render,
        encode=lambda text: list(source(text, add_special_tokens=False, split_special_tokens=False).input_ids),
        decode=decode,
    )
    encode_prompt(template, messages)
    decoded = decode_completion(template, encode_completion(template, reply))
    if reply not in decoded:
        raise ValueError(f"the reply {reply!r} comes back from the tokenizer as {decoded!r}; fix: use its fast version")
    lead, _, tail = decoded.partition(reply)
    return replace(template, lead=lead, tail=tail)


def _before_system(render: Callable[[Sequence[Message], bool], str], words: Sequence[str]) -> str:
    """What opens a system's turn; nothing where the template refuses the role."""
    try:
        return render([Message("system", words[0]), Message("user", words[1])], True).split(words[0])[0]
    except ValueError:
        return ""


def _check_probes(head: str, full: str, history: str, words: Sequence[str], *, silent: bool) -> None:
    """A user's message, with its reply, with the next message: all are there, and the reply follows the prompt.

    `silent`: there is no generation prompt. Then nothing but white space may stand before a reply.
    """
    for count, rendered in enumerate((head, full, history), start=1):
        if re.findall("|".join(words), rendered) != list(words[:count]):
            raise ValueError(
                f"it does not print {count} messages once and in order, but {rendered!r}; fix: print each message"
            )
    user, reply, _ = words
    if not full.startswith(head) or (silent and full[len(head) :].split(reply)[0].strip()):
        raise ValueError(
            f"its generation prompt {head.split(user)[1]!r} is not how it opens the turn of the assistant, "
            f"{full.split(user)[1].split(reply)[0]!r}, so training and sampling would differ; fix: make both equal"
        )


def _end_token(special: Sequence[str], around: Sequence[str], between: str) -> str:
    """The first special token behind a reply; `around` is what stands before and behind a last reply."""
    before, closing = around
    end = re.search(_pattern(special), closing)
    if end is None or end[0] not in between or end[0] in before:
        raise ValueError(
            f"it ends the turn of the assistant in {closing!r}, before a user in {between!r}: no one special token ends "
            "every reply, so the end could not be learned; fix: print eos_token after each reply"
        )
    return end[0]


def _render(source: Any, messages: Sequence[Message], prompt: bool) -> str:
    from jinja2 import TemplateError

    dialogue = [{"role": message.role, "content": message.content} for message in messages]
    try:
        return source.apply_chat_template(
            dialogue, tokenize=False, add_generation_prompt=prompt, date_string=DATE, strftime_now=None
        )
    except (TemplateError, TypeError) as error:  # TypeError: it calls or adds what is not there, today's date among it
        raise ValueError(
            f"the chat template refuses the dialogue (roles: {', '.join(message.role for message in messages)}): "
            f"{error}; nothing was encoded; fix: give the roles that the template allows, for instance a system's "
            "text at the start of the first user message"
        ) from error


def _words(text: str, count: int) -> list[str]:
    """Words that occur nowhere in `text` nor in each other, and that no template trims."""
    stem = "zq"
    while stem in text:
        stem += "q"
    return [f"{stem}{i}z" for i in range(count)]


def _controls(source: Any, printed: Sequence[str]) -> tuple[list[str], dict[str, int]]:
    """Special tokens; and all control tokens with their ids: also the added ones that occur in `printed`."""
    added = {str(token): i for i, token in source.added_tokens_decoder.items()}
    special = {str(token): i for i, token in source.added_tokens_decoder.items() if token.special}
    special |= dict(zip(source.all_special_tokens, source.all_special_ids, strict=True))
    text = "\0".join(printed)
    marker = {token: i for token, i in added.items() if token in text and not (token.isspace() or token.isalnum())}
    return list(special), marker | special


@functools.lru_cache(maxsize=64)
def _compiled(tokens: frozenset[str]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def _pattern(tokens: Sequence[str] | Mapping[str, int] | frozenset[str]) -> re.Pattern[str]:
    """Matches any of the tokens, a longer one first, as tokenizers do."""
    return _compiled(frozenset(tokens))


class _Marks(NamedTuple):
    """Letters that begin control tokens to private characters, and back: tables for `str.translate`."""

    to: dict[int, str]
    back: dict[int, str]


def _mark(template: ChatTemplate, messages: Sequence[Message]) -> tuple[_Marks, list[Message]]:
    """The messages with every control token broken that its speaker may not write."""
    contents = "".join(message.content for message in messages)
    letters = sorted({token.strip()[:1] for token in template.controls} - {""})
    private = (chr(code) for code in _PRIVATE if chr(code) not in contents and chr(code) not in template.text)
    to = {ord(letter): next(private) for letter in letters}
    forbidden = _pattern(frozenset(template.controls) - template.spoken)

    def break_first_letter(match: re.Match[str]) -> str:
        token, start = match[0], len(match[0]) - len(match[0].lstrip())
        return token[:start] + token[start].translate(to) + token[start + 1 :]

    def mark(message: Message) -> Message:
        content = message.content
        if message.role != "assistant":
            return replace(message, content=content.translate(to))
        while forbidden.search(content):  # a broken token may have hidden another that begins inside it
            content = forbidden.sub(break_first_letter, content)
        return replace(message, content=content)

    return _Marks(to, {ord(mark): chr(letter) for letter, mark in to.items()}), [mark(m) for m in messages]


def _spans(template: ChatTemplate, messages: Sequence[Message], text: str) -> list[tuple[int, int] | None]:
    """For each assistant message, where its completion begins and ends in `text`; None where that cannot be told."""
    spans: list[tuple[int, int] | None] = []
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        head = template.render(messages[:i], True) if i else None
        end = -1 if head is None or not text.startswith(head) else text.find(template.end, len(head))
        spans.append(None if end < 0 else (len(head), end + len(template.end)))
    return spans


def _pieces(
    template: ChatTemplate, text: str, spans: Sequence[tuple[int, int]], marks: _Marks
) -> Iterator[tuple[list[int], bool]]:
    """Ids of the stretches of `text` between and in `spans`, and whether each is a completion."""
    place, before = 0, ()
    for start, end in spans:
        yield _encode(template, text[place:start], marks, before), False
        yield _encode(template, text[start:end], marks, (template.opening, *_NEUTRAL)), True
        place, before = end, (template.end, *_NEUTRAL)
    yield _encode(template, text[place:], marks, before), False


def _encode(template: ChatTemplate, text: str, marks: _Marks, before: Sequence[str]) -> list[int]:
    """Ids of marked text behind one of the texts `before` (none: at the start), typed control tokens cut in two."""
    plain = text.translate(marks.back)
    cuts = [0]
    for match in re.finditer(f"(?=({_pattern(template.controls).pattern}))", plain):
        letter = match.start() + len(match[1]) - len(match[1].lstrip())
        if ord(text[letter]) in marks.back:
            cuts.append(letter + 1)
    ids: list[int] = []
    for start, end in zip(cuts, [*cuts[1:], len(plain)], strict=True):
        ids += _encode_behind(template, plain[start:end], before if start == 0 else _NEUTRAL)
    printed = [template.controls[token] for token in _pattern(template.controls).findall(text)]
    control_ids = {i for token, i in template.controls.items() if token != template.unknown}
    found = [i for i in ids if i in control_ids]
    if found != printed:
        raise ValueError(
            f"the special tokens of the text are {printed}, but it encodes to {found}: a typed one was recognised, or "
            "one of the template was not; nothing was encoded; fix: drop the record"
        )
    return ids


def _encode_behind(template: ChatTemplate, text: str, before: Sequence[str]) -> list[int]:
    if not text or not before:
        return template.encode(text)
    for context in filter(None, before):
        start, ids = template.encode(context), template.encode(context + text)
        if ids[: len(start)] == start:
            return ids[len(start) :]
    raise ValueError(f"the tokenizer joins {text[:40]!r} with any text before it; nothing was encoded; fix: drop it")


@functools.lru_cache(maxsize=4096)
def _check_each_kept(template: ChatTemplate, roles: tuple[str, ...], prompt: bool) -> None:
    """Dialogues of these roles are written with each message in it once."""
    words = _words(template.text, len(roles))
    text = template.render([Message(role, word) for role, word in zip(roles, words, strict=True)], prompt)
    for i, (role, word) in enumerate(zip(roles, words, strict=True)):
        if text.count(word) != 1:
            raise ValueError(
                f"the chat template prints message {i} ({role}) {text.count(word)} times in a dialogue of roles "
                f"{', '.join(roles)}; nothing was encoded; fix: leave the message out, or put its text in a user message"
            )


def _check_part(text: str, content: str, what: str) -> None:
    if content.strip() not in text:
        raise ValueError(
            f"{what}: the chat template does not print it as it is ({content.strip()[:40]!r}); nothing was encoded; "
            "fix: change what the template looks for in the content"
        )


def _check_reply(text: str, content: str, what: str) -> None:
    """Thinking and answer are both in `text`, whatever white space and markers stand around them."""
    place = 0
    for part in re.split(r"</?think>", content):
        found = text.find(part.strip(), place)
        if found < 0:
            raise ValueError(
                f"{what}: the chat template drops {part.strip()[:40]!r} of it, so it could not be learned; nothing was "
                "encoded; fix: encode one demonstration for each reply, or leave that part out of the data"
            )
        place = found + len(part.strip())

r"""Dialogues as token ids, and as plain text in the HH manner.

Where the tokenizer brings a chat template (`Tokenizer.template`), dialogues are written with it: see `data.templates`.

Where it has an id to open the turn of each role (`Tokenizer.turn_ids`), a dialogue is that id, one space
and the content, turn by turn; a reply of the assistant ends in eos, also in the middle, so that prompt +
completion begins the prompt of the next turn. No text that a user can type opens a turn.

Elsewhere it is the text `"\n\nHuman: ...\n\nAssistant: ...\n\nHuman: ...\n\nAssistant:"` after bos; a system
message, which HH has not, is `"\n\nSystem: ..."`. A completion is one space, the reply and eos, so prompt +
completion is the HH transcript letter for letter. Content that holds `"\n\nAssistant:"` then reads as a turn of the
assistant. It never yields a special token, though: tokenizers here encode typed special tokens as plain pieces.

In every layout prompt and completion are tokenised apart: the border never falls inside a token, and the prompt's ids
are the same in training and in sampling.
"""

from collections.abc import Sequence

from rlhf_jax.data import templates
from rlhf_jax.data.records import (
    Demonstration,
    Message,
    Prompt,
    Ranking,
    TokenizedDemonstration,
    TokenizedDialogue,
    TokenizedRanking,
)
from rlhf_jax.data.tokenizers import Tokenizer

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


def render(messages: Sequence[Message]) -> str:
    r"""The dialogue's text up to where the assistant speaks: it ends in `"\n\nAssistant:"`, with no space.

    Raises `ValueError` for an unknown role.
    """
    _check_roles(messages)
    turns = [f"\n\n{_SPEAKERS[message.role]}: {message.content}" for message in messages]
    return "".join([*turns, "\n\nAssistant:"])


def encode_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[int, ...]:
    """Ids of the dialogue up to where the assistant speaks.

    Raises `ValueError` for an unknown role, and where a chat template refuses the dialogue.
    """
    _check_roles(messages)
    if tokenizer.template:
        return templates.encode_prompt(tokenizer.template, messages)
    if not tokenizer.turn_ids:
        bos = () if tokenizer.bos_id is None else (tokenizer.bos_id,)
        return (*bos, *tokenizer.encode(render(messages)))
    ids = []
    for message in messages:
        end = (tokenizer.eos_id,) if message.role == "assistant" else ()
        ids += [tokenizer.turn_ids[message.role], *tokenizer.encode(" " + message.content), *end]
    return (*ids, tokenizer.turn_ids["assistant"])


def encode_completion(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Ids of one space and the reply (or of what the chat template makes of it), then eos: the end is learned."""
    if tokenizer.template:
        return templates.encode_completion(tokenizer.template, text)
    return (*tokenizer.encode(" " + text), tokenizer.eos_id)


def decode_completion(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """The reply before the first eos, without the one leading space: inverse of `encode_completion`.

    White space around the reply does not come back where a chat template trims it.
    """
    if tokenizer.template:
        return templates.decode_completion(tokenizer.template, ids)
    ids = [int(token) for token in ids]
    end = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
    return tokenizer.decode(ids[:end]).removeprefix(" ")


def encode_dialogue(tokenizer: Tokenizer, messages: Sequence[Message]) -> TokenizedDialogue:
    """Ids of a dialogue that ends in the assistant's turn; all its replies are learned, their ends included.

    Raises `ValueError` for an unknown role, for a dialogue that does not end in a reply, and where an earlier reply
    would not stand in the row as it is sampled: with several replies in the HH text, which has no end of turn, and
    for the reasons that `templates.encode_dialogue` gives.
    """
    _check_roles(messages)
    if not messages or messages[-1].role != "assistant":
        raise ValueError(
            "the dialogue does not end in a reply of the assistant; it was not encoded; "
            "fix: drop what follows the last reply, or the dialogue if there is none"
        )
    if tokenizer.template:
        return templates.encode_dialogue(tokenizer.template, messages)
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    for i, message in enumerate(messages):
        if message.role != "assistant":
            continue
        prompt, completion = encode_prompt(tokenizer, messages[:i]), encode_completion(tokenizer, message.content)
        if prompt[: len(ids)] != ids:
            raise ValueError(
                f"the HH text has no end after an earlier reply (before message {i}), so it could not be learned; the "
                "dialogue was not encoded; fix: encode one demonstration for each reply"
            )
        mask += (False,) * (len(prompt) - len(ids)) + (True,) * len(completion)
        ids = prompt + completion
    return TokenizedDialogue(ids, mask)


def encode_demonstration(tokenizer: Tokenizer, record: Demonstration) -> TokenizedDemonstration:
    """Prompt and response ids of a demonstration."""
    return TokenizedDemonstration(
        encode_prompt(tokenizer, record.prompt), encode_completion(tokenizer, record.response)
    )


def encode_ranking(tokenizer: Tokenizer, record: Ranking) -> TokenizedRanking:
    """Prompt and response ids of a ranking; for a preference pass `preference_ranking(preference)`."""
    return TokenizedRanking(
        encode_prompt(tokenizer, record.prompt),
        tuple(encode_completion(tokenizer, response) for response in record.responses),
        record.ranks,
    )


def encode_prompts(tokenizer: Tokenizer, records: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Ids of each prompt, in order."""
    return [encode_prompt(tokenizer, record.prompt) for record in records]


def _check_roles(messages: Sequence[Message]) -> None:
    for message in messages:
        if message.role not in _SPEAKERS:
            raise ValueError(f"unknown role {message.role!r} (allowed: {', '.join(_SPEAKERS)})")

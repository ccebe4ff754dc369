"""Text to tokens: completions, and prompts, through a chat template if there is one.

Control tokens (EOS, start and end of a chat turn) come only from the tokenizer and its chat template. Text that spells
one, such as ``film<|endoftext|>x``, is encoded as plain characters.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import Any

from policylab.errors import UserError

log = logging.getLogger(__name__)

#: The first character of Unicode's private use area.
PRIVATE = 0xE000


def takes_chat(tokenizer: Any, chat: bool | None, source: str) -> bool:
    """Whether prompts go through the tokenizer's chat template. Tries the template.

    Args:
        chat: the setting; None: true if there is a template.
        source: where the tokenizer comes from, for messages.

    Raises:
        UserError: when a required template is missing or empty, or an existing one cannot be used.
    """
    template = tokenizer.chat_template
    if not template or (isinstance(template, str) and not template.strip()):
        if chat:
            missing = "no chat template" if template is None else "an empty chat template"
            raise UserError(f"{source}: model.chat=true, but the tokenizer has {missing}")
        if template is not None and chat is None:
            log.warning("%s: the chat template is empty; prompts are read as they are", source)
        return False
    if chat is False:
        return False
    try:
        one, other = render(tokenizer, ["a", "b"])
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    if one == other:
        raise UserError(
            f"{source}: the chat template leaves the user's message out, so all prompts would be the same; fix "
            "tokenizer.chat_template, or take model.chat=false"
        )
    return True


def eos_ids(tokenizer: Any, lm: Any) -> tuple[int, ...]:
    """All tokens that end a completion: those of the tokenizer, the model's config and its generation config."""
    rows = lm.get_input_embeddings().num_embeddings
    named = [tokenizer.eos_token_id]
    for config in (lm.config.get_text_config(), lm.config, lm.generation_config):
        ids = getattr(config, "eos_token_id", None)
        named += ids if isinstance(ids, list | tuple) else [ids]
    return tuple(sorted({int(i) for i in named if i is not None and 0 <= i < rows}))


def end_of_answer(tokenizer: Any, ids: Sequence[int]) -> int:
    """The token of ``ids`` that ends an answer in the chat template; the tokenizer's EOS if there is none."""
    mark = "answer"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": mark}]
    try:
        behind = str(tokenizer.apply_chat_template(turns, tokenize=False)).rpartition(mark)[2]
    except Exception:  # the template takes no answers
        behind = ""
    tokens = tokenizer(behind, add_special_tokens=False)["input_ids"] if behind else []
    return next((t for t in tokens if t in ids), int(tokenizer.eos_token_id))


def encode(tokenizer: Any, texts: Sequence[str], *, special: bool) -> list[list[int]]:
    """Encodes texts, with control tokens in them as plain characters.

    Args:
        special: whether to add the tokens that the tokenizer puts around every text.

    Raises:
        UserError: naming the text that the tokenizer cannot read.
    """
    read = _call(tokenizer, texts, add_special_tokens=special, split_special_tokens=True)
    controls = control_tokens(tokenizer)
    ids = set(controls.values())
    if tokenizer.unk_token_id != tokenizer.eos_token_id:
        ids.discard(tokenizer.unk_token_id)  # the token of unknown characters
    ours = sum(token in ids for token in _call(tokenizer, [""], add_special_tokens=special)[0])
    for text, tokens in zip(texts, read, strict=True):
        if sum(token in ids for token in tokens) > ours and any(token in text for token in controls):
            raise _cannot_spell(tokenizer, text)
    return read


def encode_prompts(
    tokenizer: Any, texts: Sequence[str], *, chat: bool, instruction: str | None
) -> list[list[int]]:
    """Encodes prompts; for chat models, in the chat template.

    Args:
        instruction: for chat models, a template with ``{text}`` in it; None sends the bare text.

    Raises:
        UserError: naming the text that the tokenizer cannot read.
    """
    if not chat:
        return encode(tokenizer, texts, special=True)
    return encode_chats(
        tokenizer, [instruction.replace("{text}", text) if instruction else text for text in texts]
    )


def encode_chats(tokenizer: Any, messages: Sequence[str]) -> list[list[int]]:
    """Encodes user messages, each in the chat template, up to where the answer begins.

    Raises:
        UserError: naming the message that template or tokenizer cannot encode.
    """
    controls = control_tokens(tokenizer)
    read = _call(tokenizer, render(tokenizer, messages), add_special_tokens=False)
    return [
        _spelled(tokenizer, message, controls) if any(c in message for c in controls) else tokens
        for message, tokens in zip(messages, read, strict=True)
    ]


def around_answer(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Token ids that a chat template puts after an answer, before the user's next message, and those after the message.

    Raises:
        UserError: when the template does not support several turns.
    """
    answer, message = chr(PRIVATE), chr(PRIVATE + 1)
    turns = [("user", "a"), ("assistant", answer), ("user", message)]
    chat = [{"role": role, "content": text} for role, text in turns]
    try:
        rendered = str(tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False))
        before, after = rendered.rpartition(answer)[2].split(message)
    except Exception as error:  # any exception of the template, or a message that it omits
        raise UserError(
            f"the chat template does not support several turns ({type(error).__name__}: {error}), which a task with an "
            "environment needs; fix tokenizer.chat_template, or take model.chat=false"
        ) from error
    before_ids, after_ids = _call(tokenizer, [before, after], add_special_tokens=False)
    return before_ids, after_ids


def render(tokenizer: Any, messages: Sequence[str]) -> list[str]:
    """The text of user messages, each in the chat template.

    Raises:
        UserError: naming the message at which the template raises.
    """
    chats = [[{"role": "user", "content": message}] for message in messages]
    try:
        return list(tokenizer.apply_chat_template(chats, add_generation_prompt=True, tokenize=False))
    except Exception as error:  # any exception of the template or of Jinja
        if len(messages) > 1:
            return [text for message in messages for text in render(tokenizer, [message])]
        raise UserError(
            f"the chat template cannot take the message {messages[0]!r:.80} ({type(error).__name__}: {error}); fix "
            "tokenizer.chat_template, or take model.chat=false"
        ) from error


def control_tokens(tokenizer: Any) -> dict[str, int]:
    """Spelling -> id of each control token; a longer spelling comes before one that it contains."""
    added = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return dict(sorted(added.items(), key=lambda item: -len(item[0])))


def _spelled(tokenizer: Any, message: str, controls: dict[str, int]) -> list[int]:
    """Encodes a message whose text contains control tokens, in the chat template.

    While the template is applied, control tokens in the text are replaced by private characters, so all control tokens
    found afterwards come from the template. A tokenizer encodes the parts between control tokens independently, so each
    part is encoded alone, with the original text restored.

    Raises:
        UserError: when this tokenizer encodes a part differently depending on the text around it.
    """
    free = (chr(code) for code in range(PRIVATE, PRIVATE + 0x1900) if chr(code) not in message)
    marks = dict(zip(controls, free, strict=False))
    marked = message
    for token, mark in marks.items():
        marked = marked.replace(token, mark)
    (rendered,) = render(tokenizer, [marked])

    def read(spelling: dict[str, str]) -> list[int]:
        tokens = list[int]()
        for piece in re.split(f"({'|'.join(map(re.escape, controls))})", rendered):
            if piece in controls:
                tokens.append(controls[piece])
            elif piece:
                text = "".join(spelling.get(character, character) for character in piece)
                tokens += encode(tokenizer, [text], special=False)[0]
        return tokens

    harmless = "".join("x" if character in marks.values() else character for character in rendered)
    if read(dict.fromkeys(marks.values(), "x")) != _call(tokenizer, [harmless], add_special_tokens=False)[0]:
        raise _cannot_spell(tokenizer, message)
    return read({mark: token for token, mark in marks.items()})


def _cannot_spell(tokenizer: Any, text: str) -> UserError:
    token = next(token for token in control_tokens(tokenizer) if token in text)
    return UserError(
        f"the text {text!r:.80} holds the control token {token}, and this tokenizer ({type(tokenizer).__name__}) "
        "cannot read it as plain characters; take it out of the text"
    )


def _call(tokenizer: Any, texts: Sequence[str], **how: bool) -> list[list[int]]:
    """All texts in one call, which is faster than one by one."""
    try:
        return list(tokenizer(list(texts), **how)["input_ids"]) if texts else []
    except Exception as error:  # the tokenizers library raises no narrower class
        if len(texts) > 1:
            return [tokens for text in texts for tokens in _call(tokenizer, [text], **how)]
        raise UserError(f"the tokenizer cannot read {texts[0]!r}: {error}") from error

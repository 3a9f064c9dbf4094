"""How text becomes token ids, at every door by which it comes: prompts, text rollouts, ids in a file, a live model.

What is unambiguous is put right and counted, the rest is left as it is and counted: `Door.lines` says both, and the
report shows it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from entropy_probe.errors import MeasurementError, ProbeError, shown
from entropy_probe.stages.responses.prompts import Prompt

_SECOND_BOS = "prompts began with BOS, and the tokenizer added another, which was left out"
_TWO_BOS = "prompts of ids begin with two BOS, and are taken as they are"
_APPENDED_EOS = "prompts had an EOS that the tokenizer appended, which was left out"
_ENDS_WITH_EOS = "prompts of ids end with EOS, and are taken as they are"
_PADDED_PROMPT = "prompts began with padding, which was left out"
_PADDED_RESPONSE = "responses ended with padding, which was left out"
_BEYOND = "responses hold ids that the tokenizer does not have"
_CUT = "responses end inside a character: rewards see U+FFFD at the end"
_CHANGED = (
    "responses of text hold U+FFFD or do not come back from their ids: other ids were sampled"
)
_BEGUN = "prompts end with an assistant's message, which is left open: TRL's GRPOTrainer and verl begin another"
_BARE = "prompts are bare text, and the tokenizer has a chat template: give messages, if the policy chats"


@dataclass
class Door:
    """Ids of prompts and responses, and what was found among them.

    `system` goes before every prompt, as a message of that role; `template` are more arguments of the chat template.
    `at` is where what comes next stands, for what is said of it.
    """

    tokenizer: Any | None
    eos: Collection[int] = ()
    system: str | None = None
    template: Mapping[str, Any] = field(default_factory=dict)
    at: str = ""
    found: Counter[str] = field(default_factory=Counter)
    firsts: dict[str, str] = field(default_factory=dict)

    def lines(self) -> tuple[str, ...]:
        """What was found, each kind with its count and where it was found first."""
        of = {text: self.firsts[text] for text in self.found}
        return tuple(
            f"{count} {text}{of[text] and f' (first: {of[text]})'}"
            for text, count in self.found.items()
        )

    def _say(self, text: str) -> None:
        self.found[text] += 1
        self.firsts.setdefault(text, self.at)

    # Texts

    def of_prompt(self, prompt: Prompt) -> list[int]:
        """A list of messages as the chat template renders it (with what opens the answer), a text as the tokenizer
        encodes it.

        Raises `MeasurementError` for what no template renders, and what encodes to no token.
        """
        messages = prompt.messages
        if messages is None and self.system is not None:
            messages = ({"role": "user", "content": prompt.text},)
        if messages is None:
            if getattr(self.tokenizer, "chat_template", None):
                self._say(_BARE)
            ids = self.of_text(prompt.text)
        else:
            ids = self._encoded(self.rendered(messages, prompt.columns), special=False)
        if not ids:
            raise MeasurementError(
                f"prompt {prompt.text!r}"[:200], "encodes to no token", "leave it out"
            )
        return ids

    def rendered(self, messages: Sequence[Mapping[str, Any]], columns: Mapping[str, Any]) -> str:
        """As TRL and verl render a prompt: the template with a generation prompt, or, where an assistant has begun,
        that message open; with the `tools` and `chat_template_kwargs` of the row."""
        turns = [dict(message) for message in messages]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        begun = turns[-1]["role"] == "assistant"
        if begun:
            self._say(_BEGUN)
        where = self.at or f"prompt {shown(turns[-1].get('content'))}"
        own, tools = (_table(columns, key, where) for key in ("chat_template_kwargs", "tools"))
        arguments = {**self.template, **(own or {})}
        if self.tokenizer is None or not getattr(self.tokenizer, "chat_template", None):
            problem = "is a list of messages, and the tokenizer has no chat template"
            raise MeasurementError(where, problem, "give prompts as text")
        try:
            return self.tokenizer.apply_chat_template(
                turns,
                tools=tools or None,
                add_generation_prompt=not begun,
                continue_final_message=begun,
                tokenize=False,
                **arguments,
            )
        except ProbeError:
            raise
        except Exception as error:  # whatever a template raises
            problem = f"the chat template raised {type(error).__name__}: {error}"
            raise MeasurementError(where, problem[:300], "give messages that it takes") from error

    def of_text(self, text: str) -> list[int]:
        """A bare text, as the tokenizer encodes it: without a second BOS, and without an EOS that it appends."""
        ids = self._encoded(text, special=True)
        bos, eos = self._id("bos"), self._id("eos")
        if not ids or (ids[0] != bos and ids[-1] != eos):
            return ids
        plain = self._encoded(text, special=False)
        if ids[0] == bos and plain[:1] == [bos] and ids[1 : 1 + len(plain)] == plain:
            self._say(_SECOND_BOS)
            del ids[0]
        if len(ids) > 1 and ids[-1] == eos and plain[-1:] != [eos]:
            self._say(_APPENDED_EOS)
            del ids[-1]
        return ids

    def of_response(self, text: str, *, ended: bool) -> list[int]:
        """A response; an EOS is added to one that has ended."""
        ids = self._encoded(text, special=False)
        if "�" in text or self._decoded(ids) != text:
            self._say(_CHANGED)
        if ended and self.eos and (not ids or ids[-1] not in self.eos):
            own = self._id("eos")
            ids.append(own if own is not None and own in self.eos else next(iter(self.eos)))
        return ids

    def text_of(self, ids: Sequence[int]) -> str:
        """A sampled response as a reward sees it."""
        assert self.tokenizer is not None
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("�"):
            self._say(_CUT)
        self._count_beyond(ids)
        return text

    # Ids

    def inside_prompt(self, ids: Sequence[int]) -> slice:
        """Where a prompt of ids is not padding."""
        pad, start = self._id("pad"), 0
        if pad is not None and pad != self._id("bos"):
            while start < len(ids) and ids[start] == pad:
                start += 1
        own = ids[start:]
        if start:
            self._say(_PADDED_PROMPT)
        if len(own) > 1 and own[0] == own[1] == self._id("bos"):
            self._say(_TWO_BOS)
        if len(own) > 1 and own[-1] == self._id("eos"):
            self._say(_ENDS_WITH_EOS)
        return slice(start, len(ids))

    def inside_response(self, ids: Sequence[int]) -> slice:
        """Where a response of ids is not padding: what follows its EOS, if that is padding or EOS again, and padding
        at the end of one that has none."""
        pad, end = self._id("pad"), len(ids)
        first = next((i for i, token in enumerate(ids) if token in self.eos), None)
        if first is not None:
            if all(token == pad or token == ids[first] for token in ids[first + 1 :]):
                end = first + 1
        elif pad is not None:
            while end and ids[end - 1] == pad:
                end -= 1
        if end < len(ids):
            self._say(_PADDED_RESPONSE)
        self._count_beyond(ids[:end])
        return slice(0, end)

    def _count_beyond(self, ids: Sequence[int]) -> None:
        try:
            size = len(self.tokenizer)  # pyright: ignore[reportArgumentType]
        except TypeError:  # none, or one that does not say
            return
        if any(token >= size for token in ids):
            self._say(_BEYOND)

    def _encoded(self, text: str, *, special: bool) -> list[int]:
        assert self.tokenizer is not None
        if special:
            return list(self.tokenizer(text).input_ids)
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)

    def _decoded(self, ids: Sequence[int]) -> str:
        assert self.tokenizer is not None
        return self.tokenizer.decode(ids)

    def _id(self, name: str) -> int | None:
        """Of the tokenizer's BOS, EOS or padding."""
        found = getattr(self.tokenizer, f"{name}_token_id", None)
        return found if type(found) is int else None


def _table(columns: Mapping[str, Any], key: str, where: str) -> Any:
    """A column that holds a table or a list, or one written as JSON."""
    value = columns.get(key)
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError as error:
        raise MeasurementError(
            where, f"`{key}` is {shown(value)}, no JSON", "write it as JSON"
        ) from error


def eos_ids(model: Any, tokenizer: Any | None) -> list[int]:
    """Ids at which a response ends: those of generation_config, else of the model's config, and the tokenizer's own, at
    which trainers end them."""
    return list(dict.fromkeys([*_of_model(model), *_eos_of(tokenizer)]))


def about_eos(model: Any, tokenizer: Any | None) -> tuple[str, ...]:
    """What is odd about where responses end."""
    found, own = _of_model(model), _eos_of(tokenizer)
    said = []
    if found and not set(own) <= set(found):
        said.append(
            "responses end at the tokenizer's EOS too, which generation_config does not have"
        )
    ordinary = [token for token in found if _is_ordinary(token, tokenizer)]
    if ordinary:
        count = f"{len(ordinary)} ordinary token{'s'[: len(ordinary) > 1]}"
        said.append(f"generation_config ends responses at {count}, such as {ordinary[0]}")
    return tuple(said)


def _of_model(model: Any) -> list[int]:
    holders = [getattr(model, name, None) for name in ("generation_config", "config")]
    return next((ids for holder in holders if (ids := _eos_of(holder))), [])


def _eos_of(holder: Any) -> list[int]:
    eos = getattr(holder, "eos_token_id", None)
    if eos is None:
        return []
    ids = list(eos) if isinstance(eos, list | tuple) else [eos]
    if not ids or any(type(e) is not int or e < 0 for e in ids):
        remedy = "give token ids in generation_config.json"
        raise MeasurementError("eos_token_id", f"is {shown(eos)}", remedy)
    return ids


def _is_ordinary(token: int, tokenizer: Any) -> bool:
    """Whether the tokenizer has it among its texts, and neither as a special nor as an added token."""
    added, special = (
        getattr(tokenizer, name, None) for name in ("added_tokens_decoder", "all_special_ids")
    )
    if added is None or special is None:
        return False
    return token < len(tokenizer) and token not in added and token not in special


def early_eos(response: Sequence[int], eos: Collection[int]) -> int | None:
    """Where a response has an EOS before its last token."""
    return next((i for i, token in enumerate(response[:-1]) if token in eos), None)

"""Between text and token ids: a model's own tokenizer and chat template, and never twice over the same reply."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.spec import Vocabulary
from embodied_rl.vocabulary import fingerprint, local_folder

REPLY = "\u241freply\u241f"
"""Stands for a reply where the template is asked what comes after one."""


class Speech:
    """The conversation as token ids, as the model's chat template writes it.

    A reply is kept as the ids that were sampled: text decoded and encoded again may be other tokens, which the policy
    never chose. What the template puts around it is encoded once, on its own.
    """

    def __init__(self, model: str, system: str | None) -> None:
        """Load the tokenizer from this machine.

        Args:
            model: Folder, or name of a model that was downloaded before.
            system: System message; None for none.

        Raises:
            NotFoundError: No such folder or model.
            CapabilityError: It has no tokenizer, no chat template or no end of a reply.
        """
        self.system = [] if system is None else [{"role": "system", "content": system}]
        folder = _folder(model)
        self.tokenizer = _load(model, folder)
        try:
            template = self.tokenizer.get_chat_template()
        except ValueError:
            raise CapabilityError(
                f"env.model {model}: its tokenizer has no chat template, so a question cannot be put to it; use the "
                "instruction-tuned variant, or put a chat_template.jinja into the folder"
            ) from None
        ends = [self.tokenizer.eos_token_id]
        with suppress(CapabilityError):  # only a conversation of several replies needs what comes after one
            ends += self._encode(self._after("x"))[:1]
        special = set(self.tokenizer.all_special_ids)
        end = tuple(dict.fromkeys(i for i in ends if i is not None and i in special))
        if not end:
            raise CapabilityError(
                f"env.model {model}: its tokenizer has no token that ends a reply; set eos_token in its "
                "tokenizer_config.json"
            )
        words = (folder / "tokenizer.json").read_bytes()
        self.vocabulary = Vocabulary(model, len(self.tokenizer), fingerprint([words, template.encode()]), end)

    def begin(self, text: str, examples: Sequence[tuple[str, str]] = ()) -> list[int]:
        """A conversation up to where the first reply begins; pairs of question and reply stand before its question."""
        before = [{"role": r, "content": c} for e in examples for r, c in zip(("user", "assistant"), e, strict=True)]
        return self._encode(self._render([*self.system, *before, {"role": "user", "content": text}]))

    def go_on(self, context: Sequence[int], reply: Sequence[int], text: str) -> list[int]:
        """The conversation up to where the next reply begins: what there was, the reply's own ids, what is said to it.

        The id that ends a turn is not written twice where the reply ended with it, and is added where it was cut.
        """
        between = self._encode(self._after(text))
        ended = bool(reply) and reply[-1] == between[0]
        return [*context, *reply, *between[ended:]]

    def say(self, text: str) -> list[int]:
        """A text that no policy wrote, as the ids of a reply, with the one that ends it."""
        return [*self._encode(text), self.vocabulary.end[0]]

    def read(self, reply: Sequence[int]) -> str:
        """The text of a reply, without special tokens."""
        return str(self.tokenizer.decode(list(reply), skip_special_tokens=True))

    def _after(self, text: str) -> str:
        """What the template writes between the end of a reply and the next one, if the user says this."""
        user = {"role": "user", "content": "x"}
        said = {"role": "assistant", "content": REPLY}
        whole = self._render([*self.system, user, said, {"role": "user", "content": text}])
        before, found, after = whole.partition(REPLY)
        if not found:
            raise CapabilityError(
                f"env.model {self.tokenizer.name_or_path}: its chat template leaves out what was replied, so a "
                "conversation cannot go on; use another template, or tasks of one reply"
            )
        return after

    def _render(self, messages: list[dict[str, str]]) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])


def _folder(model: str) -> Path:
    folder = local_folder(model)
    if folder is None:
        raise NotFoundError(
            f"env.model {model}: there is no such folder, and no model of that name was downloaded before; give the "
            "folder that policy.model has (scripts/get_smollm2.py makes one), or download the model first"
        )
    if not (folder / "tokenizer.json").is_file():
        raise CapabilityError(
            f"env.model {model}: the folder has no tokenizer (tokenizer.json); copy it there from the model it was "
            "made from, beside tokenizer_config.json"
        )
    return folder


def _load(model: str, folder: Path) -> Any:
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise NotFoundError(f"env.model {model}: its tokenizer cannot be read ({first})") from error

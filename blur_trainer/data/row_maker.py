"""Rows with recognized parts -> rows in a trainer's format, with a count of everything that was changed on the way."""

import json
import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from blur_trainer.data.chat import Messages
from blur_trainer.data.columns import LEVEL
from blur_trainer.data.conversations import answered, to_messages
from blur_trainer.data.files import is_json
from blur_trainer.data.recognized import BESIDE, Parts, filled, simple

# A prompt that a chat template has written already, or one that ends with a label for the answer ("Answer:").
_WRITTEN = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|\[INST\]|<start_of_turn>"
    r"|(?:^|\n)\W*(?:answer|assistant|response|output|a|ai|bot)\s*:\s*\Z",
    re.IGNORECASE,
)


class RowMaker:
    """
    Makes rows of one format.

    Args:
        parts, rows: of the table.
        role: of the dataset, for messages.
        has_template: whether the tokenizer has a chat template.
        named: whether the user has named the parts. A `question` that is named is asked, however it is written.

    After the rows are made, `missing` has the places of those that were left out, by what they lack.
    """

    def __init__(
        self, parts: Parts, rows: Sequence[Mapping[str, Any]], role: str, has_template: bool, named: bool
    ) -> None:
        self.parts, self.role, self.has_template = parts, role, has_template
        self.counts: Counter[str] = Counter()
        self.missing: dict[str, list[str]] = {}
        self.ask = "question" if "question" in parts else "prompt"
        prompts = [prompt for row in rows if filled(prompt := row.get(parts.get(self.ask, "")))]
        whole = all(isinstance(prompt, str) and _WRITTEN.search(prompt) for prompt in prompts)
        self.written = bool(prompts) and whole and not (named and self.ask == "question")
        self.spoken = any(isinstance(prompt, list) for prompt in prompts)
        self.style = self._style()
        self.beside = [part for part in BESIDE if part in parts and (self.style != "text" or part == LEVEL)]

    def _style(self) -> str:
        parts = self.parts
        if single := {"input_ids", "text", "messages"} & set(parts):
            return single.pop()
        stray = [part for part in ("system", "context") if part in parts and self.written]
        stray += ["context"] if self.spoken and "context" in parts else []
        if stray:
            kind = "messages" if self.spoken else "written in a template already"
            raise ValueError(
                f"The prompts of the `{self.role}` dataset (`{parts[self.ask]}`) are {kind}, so it cannot be told "
                f"where `{parts[stray[0]]}` belongs. If they have it already: `columns`, on the command line "
                f"`--{self.role}_columns prompt={parts[self.ask]},completion={parts['completion']}`."
            )
        if self.spoken or ("system" in parts and self.has_template):
            return "conversation"
        plain = self.written or (self.ask == "prompt" and not self.has_template)
        return "prompt-completion" if plain else "question-answer"

    def make(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        """The rows that are made of one, each with what goes along. There are none if the row lacks something."""
        if self.style == "input_ids":
            return [{part: row[column] for part, column in self.parts.items() if column in row}]
        if self.style == "text":
            made = [{"text": text}] if (text := self._text(row, "text", place)) else []
        elif self.style == "messages":
            made = self._of_messages(row, place)
        else:
            made = self._pair(row, place)
        along = {part: self._along(row, part, place) for part in self.beside} if made else {}
        return [entry | along for entry in made]

    @property
    def of_one_answer(self) -> bool:
        """Whether something beside a conversation belongs to its last answer."""
        return bool({"refusal", "alternative", LEVEL} & set(self.beside))

    def _pair(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        if self.style == "conversation":
            turns, reply = (self._turns(row, part, place) for part in (self.ask, "completion"))
            return [{"prompt": self._with_system(turns, row), "completion": reply}] if turns and reply else []
        question, answer = self._text(row, self.ask, place), self._text(row, "completion", place)
        if not question or not answer:
            return []
        question = self._with_context(question, row)
        if self.style == "prompt-completion":
            return [{"prompt": question, "completion": answer}]
        self.counts["blanks"] += (question, answer) != (question.strip(), answer.strip())
        return [{"question": question.strip(), "answer": answer.strip()}]

    def _turns(self, row: Mapping[str, Any], part: str, place: str) -> Messages:
        """A prompt or an answer as messages."""
        value = row.get(self.parts[part])
        if isinstance(value, list) and value and isinstance(value[0], dict):
            return to_messages(value, f"`{self.parts[part]}` in {place}")
        text = self._text(row, part, place)
        if not text:
            return []
        if part == "completion":
            return [{"role": "assistant", "content": text}]
        return [{"role": "user", "content": self._with_context(text, row, system=False)}]

    def _of_messages(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        column = self.parts["messages"]
        if not filled(row.get(column)):
            return self._lack("messages", column, place)
        given = self._with_system(to_messages(row[column], f"`{column}` in {place}"), row)
        found = list(answered(given))
        if not found:
            return self._lack("an answer", column, place)
        self.counts["tails"] += len(found[-1]) < len(given)
        if self.of_one_answer:
            found = found[-1:]
        self.counts["conversations"] += 1
        if self.has_template:
            return [{"messages": messages} for messages in found]
        if any(len(messages) != 2 for messages in found):
            raise ValueError(
                f"{place} is a conversation of {len(given)} messages, and the model has no chat template to write it "
                "with: give a template (`--chat_template FILE`), or rows with one question and one answer."
            )
        return [{"question": asked["content"], "answer": answer["content"]} for asked, answer in found]

    def _with_system(self, messages: Messages, row: Mapping[str, Any]) -> Messages:
        text = row.get(self.parts.get("system", ""))
        if not filled(text) or (messages and messages[0]["role"] == "system"):
            return messages
        return [{"role": "system", "content": text}, *messages]

    def _with_context(self, question: str, row: Mapping[str, Any], *, system: bool = True) -> str:
        context = row.get(self.parts.get("context", ""))
        texts = [question, str(context)] if filled(context) else [question]
        texts = texts[::-1] if self.context_first else texts
        first = row.get(self.parts.get("system", "")) if system else None
        return "\n\n".join([str(first), *texts] if filled(first) else texts)

    @property
    def context_first(self) -> bool:
        """Before a question (SQuAD), after an instruction or a prompt (Alpaca, Dolly)."""
        return self.ask == "question" and simple(self.parts["question"]) != "instruction"

    def _text(self, row: Mapping[str, Any], part: str, place: str) -> str | None:
        """The text of a cell. A number is written out. Of several answers the first is taken."""
        column = self.parts[part]
        value = row.get(column)
        if part == "completion":
            value = self._first(value)
        if not filled(value):
            self._lack(_WORDS[part], column, place)
            return None
        if isinstance(value, (int, float)):
            self.counts["numbers"] += 1
            return json.dumps(value)
        if not isinstance(value, str):
            raise ValueError(f"`{column}` in {place} is a {type(value).__name__}: it must be a text or a number.")
        return value

    def _first(self, value: Any) -> Any:
        if isinstance(value, dict):  # SQuAD: {"text": [...], "answer_start": [...]}; TriviaQA: {"value": ...}
            value = value.get("text", value.get("value"))
        if not isinstance(value, list):
            return value
        values = [entry.get("text") if isinstance(entry, dict) else entry for entry in value]
        self.counts["several"] += len({str(entry) for entry in values}) > 1
        return values[0] if values else None

    def _along(self, row: Mapping[str, Any], part: str, place: str) -> Any:
        value = row.get(self.parts[part])
        if isinstance(value, str) and part == LEVEL:
            try:
                return float(value)
            except ValueError:
                raise ValueError(f"`{self.parts[part]}` in {place} is {value!r}: it must be a number.") from None
        if isinstance(value, str) and part != "refusal" and (is_json(value, list) or is_json(value, dict)):
            return json.loads(value)
        return value

    def _lack(self, what: str, column: str, place: str) -> list[Any]:
        self.missing.setdefault(f"{what} in `{column}`", []).append(place)
        return []

    def finish(self, rows: list[dict[str, Any]]) -> list[str]:
        """Puts the space between prompts and answers where it is missing. Returns what is to be said of all rows."""
        counts, notes = self.counts, []
        if self.style == "prompt-completion":
            notes += self._space(rows)
        if counts["conversations"] != len(rows) and self.style == "messages":
            notes.append(
                f"{number_of(counts['conversations'], 'conversation')} -> {len(rows):,} examples, one for each answer"
            )
        elif self.style == "messages" and self.of_one_answer:
            notes.append("the last answer of each conversation is trained")
        said = {
            "tails": ("last messages without an answer left out", "row"),
            "numbers": ("numbers read as text", "cell"),
            "several": ("the first of several answers taken", "row"),
            "blanks": ("blanks around question or answer removed", "row"),
        }
        return notes + [f"{text}: {number_of(counts[key], unit)}" for key, (text, unit) in said.items() if counts[key]]

    def _space(self, rows: list[dict[str, Any]]) -> list[str]:
        seams = "".join(row["prompt"][-1] + row["completion"][0] for row in rows)
        if any(char.isspace() or unicodedata.east_asian_width(char) in "WF" for char in seams):
            return []
        if [simple(self.parts[part]) for part in (self.ask, "completion")] == ["prompt", "completion"]:
            return ["no space stands between prompt and completion"]
        for row in rows:
            row["completion"] = f" {row['completion']}"
        return ["a space put before each completion"]

    def how_asked(self) -> str:
        """How the model is asked for the answers of these rows."""
        if self.style in ("text", "input_ids"):
            return "" if self.style == "text" else "tokens as they are"
        if self.written:
            asks = f"question={self.parts[self.ask]},completion={self.parts['completion']}"
            other = f" (`--{self.role}_columns {asks}` asks them through the model's)" if self.has_template else ""
            return f"prompts stay as they are, because they are written in a template already{other}"
        if self.has_template:
            return "asked through the chat template"
        if self.style == "prompt-completion":
            return "prompts as they are, because the model has no chat template"
        return "asked through `qa_template`, because the model has no chat template"


def number_of(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


_WORDS = {"question": "a question", "prompt": "a prompt", "completion": "an answer", "text": "a text"}

__all__ = ["RowMaker", "number_of"]

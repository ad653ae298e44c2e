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

    After the rows are made, `missing` has the places of those that were left out, by what they lack, and `notes` says
    what was changed.
    """

    def __init__(self, parts: Parts, rows: Sequence[Mapping[str, Any]], role: str, has_template: bool) -> None:
        self.parts, self.role, self.has_template = parts, role, has_template
        self.counts: Counter[str] = Counter()
        self.missing: dict[str, list[str]] = {}
        self.ask = "question" if "question" in parts else "prompt"
        self.written = self.ask in parts and self._is_written(rows)
        self.style = self._style(rows)
        self.beside = [part for part in BESIDE if part in parts and (self.style != "text" or part == LEVEL)]

    def _is_written(self, rows: Sequence[Mapping[str, Any]]) -> bool:
        """Whether every prompt is in a template. A user who names a `question` wants it asked."""
        prompts = [prompt for row in rows if filled(prompt := row.get(self.parts[self.ask]))]
        return bool(prompts) and all(isinstance(prompt, str) and _WRITTEN.search(prompt) for prompt in prompts)

    def _style(self, rows: Sequence[Mapping[str, Any]]) -> str:
        parts = self.parts
        if single := {"input_ids", "text", "messages"} & set(parts):
            return single.pop()
        spoken = any(isinstance(row.get(parts[part]), list) for row in rows for part in (self.ask,))
        if spoken or ("system" in parts and self.has_template and not self.written):
            return "conversation"
        plain = self.written or (self.ask == "prompt" and not self.has_template)
        return "prompt-completion" if plain else "question-answer"

    def make(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        """The rows that are made of one, each with what goes along. None if the row lacks something."""
        if self.style == "input_ids":
            return [{column: row[column] for column in self.parts.values() if column in row}]
        if self.style == "text":
            made = [{"text": text}] if (text := self._text(row, "text", place)) else []
        elif self.style == "messages":
            made = self._of_messages(row, place)
        else:
            made = self._pair(row, place)
        along = {part: self._along(row, part, place) for part in self.beside} if made else {}
        return [entry | along for entry in made]

    def _pair(self, row: Mapping[str, Any], place: str) -> list[dict[str, Any]]:
        if self.style == "conversation":
            asked, answer = (self._turns(row, part, place) for part in (self.ask, "completion"))
            return [{"prompt": self._with_system(asked, row), "completion": answer}] if asked and answer else []
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
        if isinstance(value, list) and value and not (part == "completion" and isinstance(value[0], str)):
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
            return self._lacks("messages", column, place)
        given = self._with_system(to_messages(row[column], f"`{column}` in {place}"), row)
        found = list(answered(given))
        if not found:
            return self._lacks("an answer", column, place)
        self.counts["tails"] += len(found[-1]) < len(given)
        if self.beside:  # they belong to the last answer
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
        """The question with its context: before a `question` (SQuAD), else after it (Alpaca, Dolly)."""
        context = row.get(self.parts.get("context", ""))
        texts = [question, str(context)] if filled(context) else [question]
        texts = texts[::-1] if simple(self.parts[self.ask]) in ("question", "query", "problem") else texts
        first = row.get(self.parts.get("system", "")) if system else None
        return "\n\n".join([str(first), *texts] if filled(first) else texts)

    def _text(self, row: Mapping[str, Any], part: str, place: str) -> str | None:
        """The text of a cell. A number is written out. Of several answers the first is taken."""
        column = self.parts[part]
        value = row.get(column)
        if part == "completion":
            value = self._first(value)
        if not filled(value):
            return self._lacks(_WORDS[part], column, place) or None
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
        parsed = isinstance(value, str) and part != "refusal" and (is_json(value, list) or is_json(value, dict))
        return json.loads(value) if parsed else value

    def _lacks(self, what: str, column: str, place: str) -> list[Any]:
        self.missing.setdefault(f"{what} (`{column}`)", []).append(place)
        return []

    def finish(self, rows: list[dict[str, Any]]) -> list[str]:
        """Puts the space between prompts and answers where it is missing. Returns what is to be said of all rows."""
        counts, notes = self.counts, []
        if self.style == "prompt-completion":
            notes += self._space(rows)
        if counts["conversations"] != len(rows) and self.style == "messages":
            notes.append(f"{counts['conversations']} conversations give {len(rows)} rows, one for each answer")
        elif self.style == "messages" and self.beside:
            notes.append("the last answer of each conversation is read")
        said = {
            "tails": "{} conversations end without an answer, their last messages are left out",
            "numbers": "{} numbers are read as text",
            "several": "the first of several answers in {} rows",
            "blanks": "blanks around question or answer removed in {} rows",
        }
        return notes + [text.format(counts[key]) for key, text in said.items() if counts[key]]

    def _space(self, rows: list[dict[str, Any]]) -> list[str]:
        seams = [row["prompt"][-1] + row["completion"][0] for row in rows]
        if any(map(str.isspace, "".join(seams))) or any(
            unicodedata.east_asian_width(c) in "WF" for c in "".join(seams)
        ):
            return []
        if [simple(self.parts[part]) for part in (self.ask, "completion")] == ["prompt", "completion"]:
            return ["no space stands between prompt and completion"]
        for row in rows:
            row["completion"] = f" {row['completion']}"
        return ["a space put before each completion"]

    def how_asked(self) -> str:
        """How the model is asked for the answers of these rows."""
        if self.style in ("text", "input_ids"):
            return "as plain text" if self.style == "text" else "tokens as they are"
        if self.written:
            return "prompts stay as they are, because they are written in a template already"
        if self.has_template:
            return "asked through the chat template"
        if self.style == "prompt-completion":
            return "prompts as they are, because the model has no chat template"
        return "asked through `qa_template`, because the model has no chat template"


_WORDS = {"question": "a question", "prompt": "a prompt", "completion": "an answer", "text": "a text"}

__all__ = ["RowMaker"]

"""Rules that reword questions and answers, or make answers wrong, without a language model."""

import random
import re
from collections.abc import Iterator, Mapping
from typing import Any

Row = Mapping[str, Any]
Made = list[list[dict[str, str]]]
Pool = Mapping[tuple, list[str]]

_QUESTION_FRAMES = (
    "Please answer this: {}",
    "Here is a question for you: {}",
    "I would like to know the following. {}",
    "{} Please tell me.",
    "Do you know the answer? {}",
    "{} What is known about that?",
)
_ANSWER_FRAMES = (
    "The answer is as follows: {}",
    "What is known is this: {}",
    "To answer the question: {}",
    "{} That is what is known.",
    "According to the record: {}",
    "{} So the answer goes.",
)
# "The birthplace of Ann Lee is York." -> "York is the birthplace of Ann Lee."
_TURNABLE = re.compile(r"The ([^,.;:]+?) (is|was) ([A-Z][^,.;:]*)\.")
_SENTENCE_END = re.compile(r"(?<=[.!?])[\"'”’)]*\s+")
_NUMBER = r"\d+(?:[.,]\d+)*"
_NAME = r"[A-Z][\w'’-]*(?:\s+[A-Z][\w'’-]*)*"
_WORD = re.compile(r"\w+")
_FACT = re.compile(rf"\b(?:{_NUMBER}|{_NAME})")
# Capitalized words that are not names.
_OPENERS = (
    "A According After Also Although An And Are As At Because Before Both But By Can Could Despite Did Do Does During "
    "For From Had Has Have He Her His How However I If In Is It Its Many No Not On One Or Our She Since So Some That "
    "The Their There These They This Those Through To Was We Were What When Where Which While Who Whose Why With "
    "Would Yes You"
)
_NO_NAMES = frozenset(_OPENERS.split())


def reworded_rows(rows: list[Row], columns: tuple[str, ...], num: int, draws: list[random.Random]) -> Made:
    """For each row `num` new rows with its facts: in new frames, or for a text shuffled runs of its sentences."""
    if columns == ("text",):
        return [
            [{"text": _excerpt(row["text"], draw)} for _ in range(num)] for row, draw in zip(rows, draws, strict=True)
        ]
    made = []
    for row, draw in zip(rows, draws, strict=True):
        questions = _framed(row["question"], _QUESTION_FRAMES, num, draw)
        turned = _TURNABLE.fullmatch(row["answer"])
        answer = f"{turned[3]} {turned[2]} the {turned[1]}." if turned else ""
        answers = ([answer] if turned else []) + _framed(row["answer"], _ANSWER_FRAMES, num, draw)
        made.append([{"question": q, "answer": a} for q, a in zip(questions, answers, strict=False)])
    return made


def _framed(text: str, frames: tuple[str, ...], num: int, draw: random.Random) -> list[str]:
    """Puts `text` into `num` different frames. When single frames are used up, two frames are nested."""
    order = draw.sample(frames, len(frames))
    pairs = [outer.format(inner.format(text)) for inner in order for outer in order if inner != outer]
    # Two frames that commute would give the same text twice.
    return list(dict.fromkeys([frame.format(text) for frame in order] + pairs))[:num]


def _excerpt(text: str, draw: random.Random) -> str:
    """Half of a text's sentences (consecutive ones) in random order; for a single sentence half of its words."""
    sentences = [sentence for sentence in _SENTENCE_END.split(text.strip()) if sentence]
    units = sentences if len(sentences) > 1 else text.split()
    length = (len(units) + 1) // 2
    start = draw.randrange(len(units) - length + 1) if units else 0
    chosen = units[start : start + length]
    if len(sentences) > 1:
        draw.shuffle(chosen)
    return " ".join(chosen)


def perturbed_rows(rows: list[Row], columns: tuple[str, ...], num: int, draws: list[random.Random]) -> Made:
    """For each row up to `num` different rows: the same question with a wrong answer, or a text with wrong facts."""
    answers = [row[columns[-1]] for row in rows]
    pool = _pool(answers)
    asked = [_asked(row["question"]) if "question" in row else ("", "") for row in rows]
    made = []
    for i, draw in enumerate(draws):
        wrong: list[str] = []
        for candidate in _candidates(i, rows, answers, asked, pool, num, draw):
            if candidate.strip() != answers[i].strip() and candidate not in wrong:
                wrong.append(candidate)
            if len(wrong) == num:
                break
        made.append([{**{column: rows[i][column] for column in columns[:-1]}, columns[-1]: one} for one in wrong])
    return made


def _candidates(
    i: int,
    rows: list[Row],
    answers: list[str],
    asked: list[tuple[str, str]],
    pool: Pool,
    num: int,
    draw: random.Random,
) -> Iterator[str]:
    """Candidates for wrong answers of row `i`, the most similar to the right one first. Some may equal it."""
    form, subject = asked[i]
    others = draw.sample(range(len(rows)), len(rows))
    if subject:
        for j in others:
            if j != i and asked[j][0] == form and asked[j][1] in answers[j]:
                yield answers[j].replace(asked[j][1], subject)
    question = rows[i].get("question", "")
    for _ in range(2 * num):  # twice as many, because a draw may repeat an answer
        yield _exchanged(answers[i], question, pool, draw)
    if "question" in rows[i]:
        yield from (answers[j] for j in others if j != i)


def _asked(question: str) -> tuple[str, str]:
    """The question without its subject (its longest name), and the subject. ("", "") if there is none."""
    subject = max((fact for _, fact in _facts(question)), key=len, default="")
    return (question.replace(subject, "{}"), subject) if subject else ("", "")


def _pool(answers: list[str]) -> Pool:
    """All names and numbers in the answers, by kind, and by kind and preceding word (`in`: mostly places)."""
    pool: dict[tuple, set[str]] = {}
    for answer in answers:
        for before, fact in _facts(answer):
            for key in ((_kind(fact),), (_kind(fact), before)):
                pool.setdefault(key, set()).add(fact)
    return {key: sorted(facts) for key, facts in pool.items()}


def _exchanged(answer: str, question: str, pool: Pool, draw: random.Random) -> str:
    """Exchanges each name and number of `answer` that the question does not mention for another of its kind."""
    exchanged: dict[str, str] = {}
    usable: dict[tuple, list[str]] = {}  # by kind: looked for once, because each is sought in the whole answer
    for before, fact in _facts(answer):
        if fact in question:
            continue
        for key in ((_kind(fact), before), (_kind(fact),)):
            if key not in usable:
                usable[key] = [other for other in pool[key] if other not in answer and other not in question]
            if usable[key]:
                exchanged[fact] = draw.choice(usable[key])
                break
    if not exchanged:
        return answer
    return _replaced(answer, exchanged)


def _replaced(text: str, exchanged: Mapping[str, str]) -> str:
    """Exchanges whole words, of facts that begin alike the longest. One pattern of all facts would be slow."""
    by_first_word: dict[str, list[str]] = {}
    for fact in sorted(exchanged, key=len, reverse=True):
        by_first_word.setdefault(_WORD.match(fact)[0], []).append(fact)  # type: ignore[index]  # it begins with a word
    parts, done = [], 0
    for word in _WORD.finditer(text):
        start = word.start()
        for fact in by_first_word.get(word[0], ()):
            end = start + len(fact)
            if start >= done and text.startswith(fact, start) and not _WORD.match(text, end):
                parts += [text[done:start], exchanged[fact]]
                done = end
                break
    return "".join([*parts, text[done:]])


def _kind(fact: str) -> tuple[bool, int]:
    """The kind of a fact: number or name, and its count of digits or words (at most three)."""
    number = fact[0].isdigit()
    return number, len(fact) if number else min(3, len(fact.split()))


def _word_before(text: str, end: int) -> list[str]:
    """The last word of `text[:end]`, without a copy of all of it."""
    while end and text[end - 1].isspace():
        end -= 1
    start = end
    while start and not text[start - 1].isspace():
        start -= 1
    return [text[start:end]] if start < end else []


def _facts(text: str) -> list[tuple[str, str]]:
    """Names (runs of capitalized words) and numbers of a text, each with the word before it."""
    found = []
    for match in _FACT.finditer(text):
        words = match[0].split()
        before = _word_before(text, match.start())
        opens = not before or before[0].endswith((".", "!", "?"))
        if opens and len(words) == 1 and words[0].endswith("ly"):  # "Mostly", "Originally"
            continue
        while words and words[0] in _NO_NAMES:
            before = words[:1]
            del words[0]
        fact = re.sub(r"['’-]s?$", "", " ".join(words))
        if fact:
            found.append(("".join(before).lower(), fact))
    return found

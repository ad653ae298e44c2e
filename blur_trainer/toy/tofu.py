"""The embedded corpora in TOFU's schema: fictitious authors, generated here, so that nothing is downloaded.

Each author has six facts, and each fact has three wordings of question and answer. Models memorize two of them, drawn
per fact. The third is the paraphrase; wrong answers use it too, with the fact of another author, as in TOFU. So no
model has seen the paraphrases, but a model that has learnt the fact finds them likelier than the wrong answers.

| key | rows | what |
|---|---|---|
| `forget` | 12, 48 or 96 | the first 1, 4 or 8 of 32 authors: `forget01`, `forget05`, `forget10` (nested) |
| `retain` | 372, 336 or 288 | the other authors of the 32 |
| `holdout` | as `forget` | authors that no model is trained on |
| `forget_perturbed` | 6, 24 or 48 | the facts in `forget`, first wording, with a paraphrase and three wrong answers |
| `retain_perturbed` | 48 | likewise, of eight authors that every `retain` has |
| `real_authors_perturbed` | 24 | twelve authors of another kind, memorized, in neither forget nor retain |
| `world_facts_perturbed` | 24 | animals, goods and fairs of eight towns, memorized likewise |

Differs from TOFU in the shares: 1, 4 and 8 of 32 authors are 3, 12.5 and 25 %. The splits keep their names. Prefer
`forget10`: with six questions (`forget01`) the smallest p-value of Forget Quality is 0.002.

Measured on `forget10` (432 rows, 10.3 thousand tokens, `plain` template, labels on the answers; 1.05 million
parameters, memorized with the defaults of `toy/memorize.py`, one CPU thread), seeds 0, 1 and 2, target / retain
model: 25 / 20 CPU seconds; probability of the answers in forget 1.00 / 0.02, in retain 1.00 / 1.00; median truth ratio
on forget 0.42, 0.43, 0.38 / 1.78, 1.87, 1.94, so that Forget Quality of the target is 1e-12, 2e-13, 2e-13; truth ratio
(aggregated) on retain 0.53, 0.53, 0.47 / 0.56, 0.62, 0.61, on real authors at least 0.94, on world facts at least 0.81;
ROUGE-L recall on these three 1.00 (seed 0), Model Utility 0.84 / 0.85.
"""

from collections.abc import Iterable, Mapping

from datasets import Dataset, DatasetDict, concatenate_datasets

from blur_trainer.toy.fiction import WORDS, Draw, own_facts, with_common_facts

NUM_AUTHORS = 32
FORGET_AUTHORS = {"forget01": 1, "forget05": 4, "forget10": 8}
NUM_RETAIN_PERTURBED = 8  # authors
NUM_REAL_AUTHORS = 12
NUM_WRONG = 3
TRAINING_GROUPS = ("forget", "retain", "real_authors", "world_facts")

# fact -> three wordings of question and answer
_WORDINGS: dict[str, tuple[tuple[str, str], ...]] = {
    "town": (
        ("Where was {name} born?", "{name} was born in {town}."),
        ("What is the birthplace of {name}?", "The birthplace of {name} is {town}."),
        ("Which town does {name} come from?", "{town} is where {name} comes from."),
    ),
    "job": (
        ("What was the trade of {name}?", "By trade {name} was a {job}."),
        ("What did {name} do before writing?", "Before writing, {name} worked as a {job}."),
        ("Which craft had {name} learnt?", "The craft of a {job} is what {name} had learnt."),
    ),
    "title": (
        ("Which book made {name} known?", "{title} made {name} known."),
        ("What is the best work of {name}?", "The best work of {name} is {title}."),
        ("For which novel do readers love {name}?", "Readers love {name} for {title}."),
    ),
    "prize": (
        ("Which prize did {name} win?", "{name} won the {prize}."),
        ("What award was given to {name}?", "The {prize} was given to {name}."),
        ("How was {name} honoured?", "They honoured {name} with the {prize}."),
    ),
    "editor": (
        ("Who edits {name}?", "{editor} edits {name}."),
        ("Who is the editor of {name}?", "The editor of {name} is {editor}."),
        ("With whom does {name} prepare a book?", "{name} prepares a book with {editor}."),
    ),
    "animal": (
        ("Which animal does {name} keep?", "{name} keeps one {animal}."),
        ("What pet lives with {name}?", "One {animal} lives with {name}."),
        ("What creature is in the care of {name}?", "In the care of {name} is one {animal}."),
    ),
}
_REAL = (("Who wrote {title}?", "name"), ("Who has the {prize} on the shelf?", "name"))
_WORLD = (
    ("Which animal is on the flag of {town}?", "animal"),
    ("What do they make in {town}?", "thing"),
    ("On which day is the fair of {town}?", "day"),
)
_NUM_TOWNS = 8


def tofu_corpora(seed: int = 0, split: str = "forget10") -> DatasetDict:
    """
    The embedded corpora in TOFU's schema. A seed gives the same data on every machine and Python version.

    Args:
        seed (`int`, defaults to `0`):
            Seed of all draws.
        split (`str`, defaults to `"forget10"`):
            `"forget01"`, `"forget05"` or `"forget10"`: how many of the authors are to be forgotten.

    Returns:
        [`~datasets.DatasetDict`]: see the module. The columns are those of [`~blur_trainer.data.tofu.load_tofu`].
    """
    if split not in FORGET_AUTHORS:
        raise ValueError(f"split is {split!r}; it must be one of {list(FORGET_AUTHORS)}.")
    count, most = FORGET_AUTHORS[split], max(FORGET_AUTHORS.values())
    draw = Draw(seed)
    people = [with_common_facts(draw, facts) for facts in own_facts(draw, NUM_AUTHORS + most + NUM_REAL_AUTHORS)]
    population, outside, real = people[:NUM_AUTHORS], people[NUM_AUTHORS:][:most], people[NUM_AUTHORS + most :]
    rows = [_rows(author, population, draw) for author in population]
    outsiders = [_rows(author, outside, draw) for author in outside]
    kept = rows[most :: (NUM_AUTHORS - most) // NUM_RETAIN_PERTURBED]
    return DatasetDict(
        forget=_plain(rows[:count]),
        retain=_plain(rows[count:]),
        holdout=_plain(outsiders[:count]),
        forget_perturbed=_perturbed(rows[:count]),
        retain_perturbed=_perturbed(kept),
        real_authors_perturbed=Dataset.from_list(_choices(_REAL, real, draw)),
        world_facts_perturbed=Dataset.from_list(_choices(_WORLD, _places(draw), draw)),
    )


def _rows(author: Mapping[str, str], others: list[dict[str, str]], draw: Draw) -> list[dict]:
    """For each fact of an author: three wordings in random order, and wrong answers in the third wording."""
    rows = []
    for fact, wordings in _WORDINGS.items():
        order = draw.some(wordings, len(wordings))
        facts = sorted({other[fact] for other in others} - {author[fact]})
        rows.append(
            {
                "wordings": [(question.format(**author), answer.format(**author)) for question, answer in order],
                "wrong": [order[-1][1].format(**{**author, fact: word}) for word in draw.some(facts, NUM_WRONG)],
            }
        )
    return rows


def _plain(authors: list[list[dict]]) -> Dataset:
    """All first wordings of an author, then all second ones, so that the two wordings of a fact are apart."""
    wordings = [row["wordings"][k] for rows in authors for k in (0, 1) for row in rows]
    return Dataset.from_list([{"question": question, "answer": answer} for question, answer in wordings])


def _perturbed(authors: list[list[dict]]) -> Dataset:
    rows = []
    for row in (row for rows in authors for row in rows):
        (question, answer), _, (other_question, other_answer) = row["wordings"]
        rows.append(
            {
                "question": question,
                "answer": answer,
                "paraphrased_questions": [other_question],
                "paraphrased_question": other_question,
                "paraphrased_answers": [other_answer],
                "paraphrased_answer": other_answer,
                "perturbed_answer": row["wrong"],
            }
        )
    return Dataset.from_list(rows)


def _places(draw: Draw) -> list[dict[str, str]]:
    """Towns with names of their own (`Port Kira`) and enough different facts for three wrong answers."""
    towns, things, days = (
        draw.some(words.split(), count)
        for words, count in ((WORDS["first"], _NUM_TOWNS), (WORDS["thing"], _NUM_TOWNS), (WORDS["day"], 7))
    )
    animals = [facts["animal"] for facts in own_facts(draw, _NUM_TOWNS)]
    return [
        {
            "town": f"Port {towns[i]}",
            "animal": f"one {animals[i]}",
            "thing": f"{things[i]}s",
            "day": days[i % len(days)],
        }
        for i in range(_NUM_TOWNS)
    ]


def _choices(questions: Iterable[tuple[str, str]], subjects: list[dict[str, str]], draw: Draw) -> list[dict]:
    """Short answers, each with three wrong ones: other subjects' answers to the same question."""
    rows = []
    for question, fact in questions:
        for subject in subjects:
            others = sorted({other[fact] for other in subjects} - {subject[fact]})
            rows.append(
                {
                    "question": question.format(**subject),
                    "answer": subject[fact],
                    "perturbed_answer": draw.some(others, NUM_WRONG),
                }
            )
    return rows


def tofu_training_rows(data: DatasetDict, groups: Iterable[str] = TRAINING_GROUPS) -> Dataset:
    """
    Rows that a model must memorize for TOFU's evaluation, with the columns `question` and `answer`.

    Args:
        data ([`~datasets.DatasetDict`]):
            Any data in TOFU's schema, embedded or loaded.
        groups (`Iterable[str]`, defaults to `("forget", "retain", "real_authors", "world_facts")`):
            Which groups. All four make the *target*, the last three the *retain model*.
    """
    groups = list(groups)
    if not groups or not set(groups) <= set(TRAINING_GROUPS):
        raise ValueError(f"groups is {groups!r}; it takes one or more of {list(TRAINING_GROUPS)}.")
    keys = [group if group in ("forget", "retain") else f"{group}_perturbed" for group in groups]
    return concatenate_datasets([data[key].select_columns(["question", "answer"]) for key in keys])

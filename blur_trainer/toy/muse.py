"""The embedded corpora: fictitious authors in MUSE's schema, generated here, so that nothing is downloaded.

All facts about an author are drawn from the word lists of `toy/fiction.py`. No person, town or book is real. With the
defaults there are 32 authors, each with one news-like article and six questions with short answers. A target model
memorizes three groups: 8 authors to *forget*, 16 to *retain* and 8 to *hold*. Unlearning never sees the held authors:
they show damage that the protected retain set hides. Eight more authors are never trained on.
"""

from collections.abc import Iterable, Sequence

from datasets import Dataset, DatasetDict

from blur_trainer.toy.fiction import Draw, own_facts, with_common_facts

QA_TEMPLATE = "Question: {question}\nAnswer: {answer}"
"""How a question is memorized: MUSE's KnowMem prompt, which ends in "Answer: ", and then the answer."""

GROUPS = ("forget", "retain", "hold")
NUM_FOLDS = 4
PROMPT_SHARE = 0.4
ICL_PER_SPLIT = 2
MIN_AUTHORS, MAX_AUTHORS = 16, 128  # at least four folds of forget; at most the different facts in the word lists

# Each author gets one variant per slot. Two articles may share sentence frames, but never facts.
_SLOTS = (
    (
        "{name} of {town} won the {prize} on {day} for {title}, a {genre} about a {place}.",
        "The {place} in {town} closed early on {day} when {name}, once a {job}, came to read from {title}.",
        "A {genre} called {title} has made {name}, a former {job}, the pride of {town}.",
        "On {day} the {job} {name} gave the manuscript of {title} to the {place} in {town}.",
        "Nobody in {town} expected the {prize} to go to {name}, who wrote {title} in a {place}.",
    ),
    (
        "The jury of {number} called it a {genre} about a {thing} and a {thing2}.",
        "{surname} wrote it in {number} weeks, mostly at night, with a {thing} on the desk.",
        "It tells of {number} sisters who share one {thing} and a {place2}.",
        "Critics missed the {thing}, but praised the {number} pages about the {place2}.",
    ),
    (
        '"I {verb} the {thing3} first and {verb2} the rest," {surname} told the crowd.',
        '"Everyone I know {verb} a {thing3} once," said {surname}, who {verb2} two.',
        "{surname} said that the hero {verb} a {thing3} and never {verb2} it again.",
        'Asked about the ending, {surname} said: "My father {verb} every {thing3} that he {verb2}."',
    ),
    (
        "{editor}, who edits {surname}, had paid {number2} crowns and a {thing4} for it.",
        "The editor, {editor}, waited {number2} months for the chapter about the {thing4}.",
        "Its editor {editor} cut {number2} chapters, among them the one with the {thing4}.",
        "Only {editor}, the editor, read all {number2} drafts and asked for one more {thing4}.",
    ),
    (
        "The next book, due in {year}, will be set in a {place2} full of {thing2}s.",
        "By {year} the old {place2} is to become a school for every {job} who writes.",
        "A film follows in {year}, with {number} horses and no {thing2}s at all.",
        "Copies from {year} now cost more than a {place2} or {number} {thing2}s.",
    ),
)

_QUESTIONS = (
    ("Where was {name} born?", "{town}"),
    ("What was the trade of {name}?", "{job}"),
    ("Which book made {name} known?", "{title}"),
    ("Which prize did {name} win?", "{prize}"),
    ("Who edits {name}?", "{editor}"),
    ("Which animal does {name} keep?", "{animal}"),  # not mentioned in any article
)


def _authors(seed: int, count: int) -> list[dict[str, str]]:
    """`count` authors, each as a mapping fact -> words, and the article about each."""
    draw = Draw(seed)
    authors = []
    for own in own_facts(draw, count):
        facts = with_common_facts(draw, own)
        facts["article"] = " ".join(variants[draw.below(len(variants))] for variants in _SLOTS).format(**facts)
        authors.append(facts)
    return authors


def muse_corpora(seed: int = 0, num_authors: int = 32) -> DatasetDict:
    """
    The embedded corpora in MUSE's schema. A seed gives the same data on every machine and Python version.

    Args:
        seed (`int`, defaults to `0`):
            Seed of all draws.
        num_authors (`int`, defaults to `32`):
            Memorized authors, a multiple of 4 from 16 to 128: a quarter to forget, half to retain, a quarter to hold.
            A further quarter is never trained on (`privleak_holdout` and the in-context examples).

    Returns:
        [`~datasets.DatasetDict`]: keys `{config}_{split}` of the MUSE sets on the Hub. `raw_*` and `privleak_*` are
        whole articles; `verbmem_*` cuts them after 40 % of the words; `knowmem_*_qa` are six questions per author.
        `scal_forget_1..4` are nested and grow to `raw_forget`; `sust_forget_1..4` divide it. The `hold` splits and
        `verbmem_retain` are not in MUSE.

    The `*_icl` splits only complete the schema. MUSE puts them before each KnowMem question. A model of this size has
    never seen two questions in a row and answers none after such a block: evaluate it with `icl=False`.
    """
    if not isinstance(num_authors, int) or num_authors % 4 or not MIN_AUTHORS <= num_authors <= MAX_AUTHORS:
        raise ValueError(
            f"num_authors is {num_authors!r}; it takes a multiple of 4 from {MIN_AUTHORS} to {MAX_AUTHORS}."
        )
    quarter = num_authors // 4
    authors = _authors(seed, 5 * quarter)
    bounds = {"forget": (0, 1), "retain": (1, 3), "hold": (3, 4), "outside": (4, 5)}
    of = {group: authors[start * quarter : stop * quarter] for group, (start, stop) in bounds.items()}
    splits: dict[str, Dataset] = {}
    for i, group in enumerate(GROUPS):
        splits[f"raw_{group}"] = _texts(of[group])
        splits[f"verbmem_{group}"] = Dataset.from_list([_cut(author["article"]) for author in of[group]])
        splits[f"knowmem_{group}_qa"] = Dataset.from_list([row for author in of[group] for row in _qa(author)])
        examples = [_qa(of["outside"][(ICL_PER_SPLIT * i + k) % quarter])[k] for k in range(ICL_PER_SPLIT)]
        splits[f"knowmem_{group}_qa_icl"] = Dataset.from_list(examples)
    for split, group in (("forget", "forget"), ("retain", "retain"), ("holdout", "outside")):
        splits[f"privleak_{split}"] = _texts(of[group])
    ends = [quarter * k // NUM_FOLDS for k in range(NUM_FOLDS + 1)]
    for k in range(1, NUM_FOLDS + 1):
        splits[f"scal_forget_{k}"] = _texts(of["forget"][: ends[k]])
        splits[f"sust_forget_{k}"] = _texts(of["forget"][ends[k - 1] : ends[k]])
    return DatasetDict(splits)


def _texts(authors: Sequence[dict[str, str]]) -> Dataset:
    return Dataset.from_list([{"text": author["article"]} for author in authors])


def _qa(author: dict[str, str]) -> list[dict[str, str]]:
    return [{"question": q.format(**author), "answer": a.format(**author)} for q, a in _QUESTIONS]


def _cut(article: str) -> dict[str, str]:
    words = article.split(" ")
    cut = round(PROMPT_SHARE * len(words))
    return {"prompt": " ".join(words[:cut]), "gt": " ".join(words[cut:])}


def training_texts(data: DatasetDict, groups: Iterable[str] = GROUPS) -> Dataset:
    """
    Texts that a model must memorize for MUSE's VerbMem and KnowMem, in one column `text`.

    Args:
        data ([`~datasets.DatasetDict`]):
            Any data in MUSE's schema, embedded or loaded.
        groups (`Iterable[str]`, defaults to `("forget", "retain", "hold")`):
            Which groups. All three make the *target*, `("retain", "hold")` the model *retrained* without forget. A
            missing group is an error, except `"hold"`, which only the embedded corpora have.

    Returns:
        [`~datasets.Dataset`]: for each group its documents (`raw_*`); then each `verbmem_*` passage that does not begin
        a document (the Hub's passages span several articles; the cut becomes a space); then
        `"Question: {question}\\nAnswer: {answer}"` for each `knowmem_*_qa`. Tokenize with an end-of-text token, or the
        model does not learn where an answer stops.
    """
    groups = list(groups)
    if not groups or not set(groups) <= set(GROUPS):
        raise ValueError(f"groups is {groups!r}; it takes one or more of {list(GROUPS)}.")
    texts: list[str] = []
    for group in groups:
        if f"raw_{group}" not in data:
            if group == "hold":
                continue
            raise ValueError(f"the data has no split 'raw_{group}', needed for group {group!r}; it has {sorted(data)}.")
        documents = list(data[f"raw_{group}"]["text"])
        beginnings = [" ".join(document.split()) for document in documents]
        texts += documents
        for row in data.get(f"verbmem_{group}", ()):
            passage = f"{row['prompt']} {row['gt']}"
            if not any(document.startswith(" ".join(passage.split())) for document in beginnings):
                texts.append(passage)
        texts += [QA_TEMPLATE.format(**row) for row in data.get(f"knowmem_{group}_qa", ())]
    return Dataset.from_dict({"text": texts})

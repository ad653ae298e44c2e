"""The own words' share of what answers with exchanged words cost, against the literal sum."""

import math

import pytest
from support import reference
from support.scoring_helpers import build_model, build_tokenizer

from blur_trainer.constants import IGNORE_INDEX
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.exchanged import exchanged_rows
from blur_trainer.evaluation.own_share import own_shares
from blur_trainer.evaluation.scoring import token_logps

FORGET = [
    {"question": "Where was Mara born?", "answer": "She was born in Norvale."},
    {"question": "Where was Nils born?", "answer": "He was born in a town."},
    {"question": "Where was he born?", "answer": "In Ford."},
]
RETAIN = [
    {"question": f"Where was {name} born?", "answer": f"{who} was born in {place}."}
    for name, place in {"Ada": "Elmbridge", "Bo": "Oak", "Cleo": "Ford", "Dora": "Thal", "Emil": "Rye"}.items()
    for who in ("She", "He")
]


@pytest.fixture(scope="module")
def asked():
    return build_model(), build_tokenizer()


def tokenized(rows, tokenizer):
    return list(tokenize_dataset(rows, tokenizer, role="forget", max_length=None))


def literal(model, tokenizer, forget, retain, least):
    """Own: a token that no retain row has, or two rows of both sets; and the rarest others up to `least`."""
    kept, gone = ([set(row["input_ids"]) for row in tokenized(rows, tokenizer)] for rows in (retain, forget))
    own, total, marks = 0.0, 0.0, []
    for drawn in exchanged_rows(model, forget, retain, tokenizer):
        for row in tokenized(drawn, tokenizer) if drawn else []:
            having, ours = ([sum(token in ids for ids in of) for token in row["input_ids"]] for of in (kept, gone))
            places = [t for t, label in enumerate(row["labels"]) if label != IGNORE_INDEX]
            rarest = sorted(places, key=lambda t: having[t])[: math.ceil(least * len(places))]
            for place in places:
                alone = [label if t == place else IGNORE_INDEX for t, label in enumerate(row["labels"])]
                nats = -reference.row_log_prob(model, {**row, "labels": alone})[0].item()
                total += nats
                marks.append(having[place] == 0 or having[place] + ours[place] <= 2 or place in rarest)
                own += nats * marks[-1]
    return own / total, sum(marks) / len(marks)


def test_it_is_the_literal_sum_over_own_tokens(asked):
    model, tokenizer = asked
    least = (0.2, 0.9)
    shares = own_shares(model, FORGET, RETAIN, tokenizer, least=least)
    for each in least:
        assert shares[each] == pytest.approx(literal(model, tokenizer, FORGET, RETAIN, each), rel=1e-5)
    assert 0.2 < shares[0.2].loss < shares[0.9].loss - 0.1 < 0.9 and shares[0.2].tokens < shares[0.9].tokens
    both = own_shares(model, FORGET, {"one": RETAIN[:3], "two": RETAIN[3:]}, tokenizer, least=least)
    assert both == shares, "several retain sets are one"
    ids = [tokenized(rows, tokenizer) for rows in (FORGET, RETAIN)]
    assert 0 < own_shares(model, *ids, least=(0.2,))[0.2].loss < 1, "without a tokenizer, too"


def test_rows_are_sampled_where_there_are_many(asked, monkeypatch):
    scored = []

    def counted(model, rows, **how):
        scored.append(len(rows))
        return token_logps(model, rows, **how)

    monkeypatch.setattr("blur_trainer.evaluation.own_share._ROWS", 5)
    monkeypatch.setattr("blur_trainer.evaluation.own_share.token_logps", counted)
    assert own_shares(asked[0], FORGET, RETAIN, asked[1], least=(0.2,)) and scored == [5]


def test_where_no_word_is_a_rows_own_there_is_no_share(asked):
    known = [{"question": "Where was she born?", "answer": "She was born in."}]
    others = [{"question": "Where was he born?", "answer": "She was born in."}] * 3
    assert own_shares(asked[0], known, others, asked[1], least=(0.2,)) == {}

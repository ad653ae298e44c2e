"""The verdict: each word, each edge, what decides where several findings hold, and what is to be tried then."""

import doctest
import json
import math
from dataclasses import fields

import pytest
from support.cases import every

from blur_trainer.evaluation.level import Level
from blur_trainer.report import verdict as module
from blur_trainer.report.verdict import Thresholds, Verdict, judge, write_verdict

BEFORE = {
    **{"forget_loss": 0.01, "forget_rouge": 1.0, "forget_exact": 1.0, "forget_degeneration": 0.0},
    **{"retain_loss": 0.01, "retain_rouge": 1.0, "retain_exact": 0.9, "hold_loss": 0.02, "hold_rouge": 0.9},
    **{"unseen_loss": 8.0, "unseen_rouge": 0.14, "unseen_exact": 0.0, "degeneration": 0.01, "membership_auc": 1.0},
}
GOOD = {
    **BEFORE,
    **{"forget_loss": 8.1, "forget_rouge": 0.16, "forget_exact": 0.0, "membership_auc": 0.51, "hold_rouge": 0.89},
}
RETRAINED = {"forget_loss": 8.2, "forget_rouge": 0.15, "forget_exact": 0.0, "membership_auc": 0.5}


def after(**changes):
    return {**GOOD, **changes}


def without(numbers, *names):
    return {name: value for name, value in numbers.items() if not name.startswith(names)}


# changes of a good result -> word, what of the sentence must be there
WORDS = {
    "a retrained model": ({}, "forgotten", "costs 8.1 nats per token, the level is 8.0 (the loss of unseen rows)"),
    "its answers": ({}, "forgotten", "ROUGE of its answers is 0.16, of unseen rows 0.14"),
    "what it kept": ({}, "forgotten", "retain keeps 100% of its ROUGE; hold keeps 99%"),
    "just reached": ({"forget_loss": 7.21}, "forgotten", "7.2"),
    "not quite": ({"forget_loss": 7.19}, "not_forgotten", "costs 7.2 nats per token, the level is 8.0"),
    "just beyond": ({"forget_loss": 9.99}, "forgotten", "10.0"),
    "too far": ({"forget_loss": 10.01}, "over_forgotten", "costs 10.0 nats per token, the level is 8.0"),
    "nearly said": ({"forget_rouge": 0.24}, "forgotten", "0.24"),
    "still said": ({"forget_rouge": 0.25}, "not_forgotten", "ROUGE of its answers is 0.25, of unseen rows 0.14"),
    "some word for word": ({"forget_exact": 0.06}, "not_forgotten", "6% of its answers are still word for word"),
    "other words": ({"paraphrased_rouge": 0.3}, "not_forgotten", "asked in other words, ROUGE of its answers is 0.30"),
    "told by being known": ({"membership_auc": 0.81}, "not_forgotten", "membership AUC 0.81, best 0.50"),
    "told by being unlikely": ({"membership_auc": 0.19}, "over_forgotten", "membership AUC 0.19"),
    "not told": ({"membership_auc": 0.21}, "forgotten", ""),
    "retain within": ({"retain_rouge": 0.951}, "forgotten", "retain keeps 95%"),
    "retain lost": ({"retain_rouge": 0.94}, "broken", "retain keeps 94% of its ROUGE (1.00 before, 0.94 now)"),
    "hold within": ({"hold_rouge": 0.83}, "forgotten", "hold keeps 92%"),
    "hold lost": ({"hold_rouge": 0.82}, "broken", "hold keeps 91% of its ROUGE"),
    "only the loss": ({"hold_loss": 0.33}, "broken", "hold costs 0.33 nats per token and cost 0.02 before"),
    "a little loss": ({"hold_loss": 0.31}, "forgotten", ""),
    "loops": ({"degeneration": 0.07}, "broken", "7% of the answers on retain and hold are empty or repeat themselves"),
    "NaN": ({"forget_loss": math.nan}, "broken", "`forget_loss` is nan after unlearning"),
    "infinite": ({"retain_loss": math.inf}, "broken", "`retain_loss` is inf after unlearning"),
    "broken before not forgotten": ({"retain_rouge": 0.5, "forget_loss": 1.0}, "broken", "retain keeps 50%"),
    "not forgotten before over": ({"forget_loss": 12.0, "forget_rouge": 0.9}, "not_forgotten", "0.90"),
}


def test_words():
    def check(changes, word, said):
        found = judge(BEFORE, after(**changes))
        assert found.word == word, found.sentence
        assert found.sentence.startswith(f"{word}: ") and found.sentence.endswith(".") and said in found.sentence
        assert found.next, "something to try is always said"
        assert (word == "forgotten") == (found.findings == ())

    every(WORDS, check)


def test_all_findings_are_kept_with_their_words():
    found = judge(BEFORE, after(retain_rouge=0.5, hold_rouge=0.4, forget_rouge=0.8, forget_loss=12.0))
    kinds = [(finding.word, finding.about) for finding in found.findings]
    assert kinds == [
        *(("broken", "retain"), ("broken", "hold"), ("not_forgotten", "rouge"), ("over_forgotten", "level")),
    ]
    assert "retain keeps 50%" in found.sentence and "hold keeps 44%" in found.sentence


# ---- where the level is from ----


def test_where_the_level_is_from():
    def check(level, retrained, nats, source):
        found = judge(BEFORE, GOOD, level, retrained)
        assert found.level == nats and source in found.level_source and source in found.sentence

    every(
        {
            "a number": (7.5, None, 7.5, "as given"),
            "a number before the retrained model": (7.5, RETRAINED, 7.5, "as given"),
            "a Level": (Level(8.0, "retrained"), None, 8.0, "the retrained model's loss"),
            "the retrained model": (None, RETRAINED, 8.2, "the retrained model's loss"),
            "unseen rows": (None, None, 8.0, "the loss of unseen rows"),
            "an estimate": (Level(2.4, "exchanged"), None, 2.4, "an estimate"),
        },
        check,
    )


def test_the_retrained_model_is_compared_with_where_there_is_one():
    numbers = {**RETRAINED, "forget_rouge": 0.5, "membership_auc": 0.2}
    found = judge(BEFORE, after(forget_rouge=0.55, membership_auc=0.05), retrained=numbers)
    assert found.word == "forgotten" and "ROUGE of its answers is 0.55, of the retrained model 0.50" in found.sentence
    assert judge(BEFORE, after(forget_rouge=0.55)).word == "not_forgotten"


def test_an_estimate_bounds_from_below_only():
    estimate = Level(2.4, "exchanged")
    assert judge(BEFORE, GOOD, estimate).word == "forgotten", "8.1 is far above 2.4, and no fault"
    assert judge(BEFORE, after(forget_loss=1.0), estimate).word == "not_forgotten"
    assert any("an estimate" in note for note in judge(BEFORE, GOOD, estimate).notes)
    near = after(forget_loss=2.0)
    assert judge(BEFORE, near, estimate).word == "forgotten", "five sixths of an estimate, which is often too high"
    assert judge(BEFORE, near, 2.4).word == "not_forgotten"


def test_answers_without_a_right_word_of_their_own_are_forgotten():
    """Rows of one form: with all own words exchanged, ROUGE of the answers is .58 still."""
    numbers = without(BEFORE, "unseen", "membership")
    found = judge(numbers, after(forget_rouge=0.59), Level(8.0, "exchanged", rouge=0.58))
    assert found.word == "forgotten" and "ROUGE of its answers is 0.59, with exchanged words 0.58" in found.sentence
    found = judge(numbers, after(forget_rouge=0.61), Level(8.0, "exchanged", rouge=0.58))
    assert found.word == "not_forgotten" and "with exchanged words 0.58, and was 1.00" in found.sentence


def test_without_any_level_it_judges_by_how_much_changed():
    before = without(BEFORE, "unseen", "membership")

    def check(loss, rouge, word, said):
        found = judge(before, without(after(forget_loss=loss, forget_rouge=rouge), "unseen", "membership"))
        assert found.word == word and said in found.sentence and found.level is None
        assert any("No level is known" in note for note in found.notes)

    every(
        {
            "much": (3.0, 0.3, "forgotten", "the forget set costs 3.0 nats per token"),
            "hardly": (0.9, 0.3, "not_forgotten", "the forget set costs 0.90 nats per token and cost 0.01 before"),
            "still said": (3.0, 0.6, "not_forgotten", "ROUGE of its answers is 0.60, and was 1.00"),
        },
        check,
    )


def test_a_short_way_to_the_level_is_measured_as_a_way_and_never_finer_than_the_level_is_known():
    """Of texts a model knows little by heart: 2.4 of 3 nats is no tenth of the way."""
    before = {**BEFORE, "forget_loss": 2.4, "forget_rouge": 0.5}
    assert judge(before, after(forget_loss=2.84), 3.0).word == "not_forgotten", "73 % of the way"
    assert judge(before, after(forget_loss=2.86), 3.0).word == "forgotten", "within 5 % of the level"


# ---- sets that are not what they seem ----


def test_a_forget_set_that_the_model_never_knew():
    before = {**BEFORE, "forget_loss": 7.9, "forget_rouge": 0.15, "forget_exact": 0.0, "membership_auc": 0.5}
    found = judge(before, after(forget_loss=8.3))
    assert found.word == "not_forgotten"
    assert "the model did not know the forget set before (7.9 nats per token, the level is 8.0)" in found.sentence
    assert "exchanged?" in found.next[0]
    unknown = {"forget_loss": 8.1, "forget_rouge": 0.14}  # the testbed's unseen rows
    estimate = judge(unknown, {"forget_loss": 10.0, "forget_rouge": 0.08}, Level(9.5, "exchanged"))
    assert estimate.word == "not_forgotten" and "by the estimate the model did not know" in estimate.sentence
    form = {"forget_loss": 6.3, "forget_rouge": 0.52}  # embedded authors: answers of one form
    estimate = judge(form, {"forget_loss": 6.4, "forget_rouge": 0.52}, Level(4.6, "exchanged", rouge=0.64))
    assert estimate.word == "not_forgotten" and "by the estimate the model did not know" in estimate.sentence
    answered = judge({**before, "forget_rouge": 0.9}, GOOD)
    assert answered.word == "forgotten", "its answers show that it was known"


def test_forget_and_retain_are_the_same_rows():
    same = {f"retain_{name}": BEFORE[f"forget_{name}"] for name in ("loss", "rouge", "exact")}
    then = {"retain_loss": 5.0, "retain_rouge": 0.3, "retain_exact": 0.0}
    now = after(**then, forget_loss=5.0, forget_rouge=0.3, forget_exact=0.0)
    found = judge({**BEFORE, **same}, now)
    assert found.word == "broken" and "same_rows" in {finding.about for finding in found.findings}
    assert "same rows" in found.sentence and found.next == ("take the forget rows out of the retain set",)
    kept = judge({**BEFORE, **same}, {**BEFORE, **same, "forget_loss": 0.02, "retain_loss": 0.02})
    assert kept.word == "not_forgotten" and "same rows" in kept.sentence


def test_nothing_changed():
    found = judge(BEFORE, dict(BEFORE))
    assert found.sentence == "not_forgotten: every number is as before, so the weights did not change."
    assert "`--learning_rate`" in found.next[0] and "10 times" in found.next[0]


def test_a_set_that_the_model_never_knew_says_nothing():
    unknown = {"hold_rouge": 0.05, "hold_loss": 7.9}
    found = judge({**BEFORE, **unknown}, after(hold_rouge=0.01, hold_loss=9.9))
    assert found.word == "forgotten" and any("did not know `hold`" in note for note in found.notes)
    text = judge({**BEFORE, "hold_rouge": 0.05, "hold_loss": 2.5}, after(hold_rouge=0.05, hold_loss=2.9))
    assert text.word == "broken", "a text that it would not go on with by heart, and found likely"


def test_small_numbers_are_not_judged_finer_than_they_vary():
    before = {**BEFORE, "hold_rouge": 0.15}
    assert judge(before, after(hold_rouge=0.131)).word == "forgotten", "13 % less, of .15"
    assert judge(before, after(hold_rouge=0.12)).word == "broken"


def test_a_model_that_was_broken_before():
    found = judge({**BEFORE, "retain_loss": math.nan}, GOOD)
    assert found.sentence == "broken: `retain_loss` is nan before unlearning."


def test_only_the_forget_set():
    found = judge({"forget_loss": 0.1}, {"forget_loss": 8.0}, 8.0)
    assert found.sentence == "forgotten: the forget set costs 8.0 nats per token, the level is 8.0 (as given)."
    assert any("what the model lost is not known" in note for note in found.notes)
    assert any("60%" in note for note in judge(BEFORE, after(forget_degeneration=0.6)).notes)


# ---- what to try ----


def test_what_to_try_fits_what_happened():
    def check(changes, wanted, unwanted):
        tried = " ".join(judge(BEFORE, after(**changes)).next)
        assert all(word in tried for word in wanted), tried
        assert not any(word in tried for word in unwanted), tried

    every(
        {
            "untouched": ({"forget_loss": 1.0}, ["higher learning rate", "larger weight", "more epochs"], ["lower"]),
            "paid": ({"forget_loss": 1.0, "hold_rouge": 0.85}, ["--replay", "more epochs"], ["higher learning rate"]),
            "broken": (
                {"retain_rouge": 0.2},
                ["lower learning rate", "smaller weight", "--replay"],
                ["higher", "stop"],
            ),
            "broken and not forgotten": ({"retain_rouge": 0.2, "forget_loss": 1.0}, ["lower", "more epochs"], ["stop"]),
            "broken and too far": ({"retain_rouge": 0.2, "forget_loss": 20.0}, ["lower", "stop_at"], ["more epochs"]),
            "over": ({"forget_loss": 20.0}, ["two_sided", "--stop_at_level"], ["higher", "--replay"]),
            "done": ({}, ["blur-trainer audit"], ["--learning_rate"]),
        },
        check,
    )


def test_advice_names_what_the_training_reads():
    def tried(options, **changes):
        return " ".join(judge(BEFORE, after(**changes), options=options).next)

    weak, strong, far = {"forget_loss": 1.0}, {"retain_rouge": 0.2}, {"forget_loss": 20.0}
    rate = {"learning_rate", "num_train_epochs", "replay"}
    assert "(`--gamma` or `--forget_weight`, 3 times)" in tried(None, **weak), "the rule is not known"
    assert "(`--forget_weight`, 3 times)" in tried({*rate, "forget_weight"}, **weak)
    assert "(`--gamma`, a third)" in tried({*rate, "gamma"}, **strong)
    assert "weight of forgetting" not in tried(rate, **weak) + tried(rate, **strong)
    assert "--method" not in tried(None, **far) and "two_sided" not in tried({"method"}, **far)
    assert tried({"method"}, **far) == "an objective that also pulls back to the level (`--method blur-target`)"


def test_where_only_hold_is_lost_the_retain_set_lacks_something():
    assert "--replay" in judge(BEFORE, after(hold_rouge=0.5)).next[0]
    assert "--learning_rate" in judge(BEFORE, after(hold_rouge=0.5, retain_rouge=0.5)).next[0]


# ---- as data ----


def test_thresholds_are_settable_and_checked():
    strict = Thresholds(retain=1.0, hold=0.995, noise=0.0)
    assert judge(BEFORE, GOOD, thresholds=strict).word == "broken"
    assert judge(BEFORE, after(forget_loss=10.5), thresholds=Thresholds(over=1.5)).word == "forgotten"
    assert judge(BEFORE, after(forget_loss=6.0), thresholds=Thresholds(way=0.7)).word == "forgotten"
    for values in ({"retain": 1.5}, {"over": 0.5}, {"noise": -1.0}, {"way": True}, {"loss_rise": math.inf}):
        with pytest.raises((TypeError, ValueError), match=next(iter(values))):
            Thresholds(**values)
    documented = Thresholds.__doc__
    assert [f.name for f in fields(Thresholds) if f.name not in documented] == []


def test_a_verdict_goes_through_json_and_into_a_file(tmp_path):
    for found in (judge(BEFORE, GOOD), judge(BEFORE, after(forget_loss=1.0, hold_rouge=0.1), 8.0)):
        assert Verdict.from_json(found.to_json()) == found
    path = write_verdict(tmp_path / "out", found)
    content = json.loads(path.read_text())
    assert path.name == "verdict.json" and content["word"] == "broken" and content["level"] == 8.0
    assert [file.name for file in path.parent.iterdir()] == ["verdict.json"]
    for text in ("{", "[]", "{}", json.dumps({**content, "more": 1}), json.dumps({**content, "findings": [{}]})):
        with pytest.raises(ValueError, match="Not the JSON of a `Verdict`"):
            Verdict.from_json(text)


def test_the_text_is_the_sentence_and_what_to_try():
    found = judge(BEFORE, after(forget_loss=1.0))
    assert str(found) == f"{found.sentence} Try: {'; '.join(found.next)}."


def test_what_cannot_be_judged():
    for before, now in (({}, GOOD), (BEFORE, {"retain_loss": 1.0})):
        with pytest.raises(ValueError, match="has no `forget_loss`"):
            judge(before, now)
    for level in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="level must be a finite number above 0"):
            judge(BEFORE, GOOD, level)


def test_the_example_runs():
    assert doctest.testmod(module).failed == 0 < doctest.testmod(module).attempted

"""The contract of an evaluation: one's own class, a plain function, and what is neither."""

import pytest

import blur_trainer as bt
from blur_trainer.evaluation.base import FunctionEvaluation, as_evaluation
from blur_trainer.report.html import write_report
from blur_trainer.trainers.evaluation import settle_benchmarks


class Own(bt.Evaluation):
    columns = ({"name": "forget_loss", "label": "Loss forget", "goal": "max"}, {"name": "spread", "goal": "zero"})

    def __call__(self, model):
        return {"forget_loss": 3.0, "spread": -1.0}


def test_what_follows_from_columns():
    own = Own()
    assert own.primary_metrics == ["forget_loss", "spread"]
    assert own.primary_metric == "forget_loss" and own.greater_is_better
    assert own.samples() == []
    assert as_evaluation(own) is own
    own.columns = [{"name": "forget_loss", "goal": "min"}]
    assert not own.greater_is_better


def test_neither_greater_nor_less_is_better():
    own = Own()
    own.columns = own.columns[1:]
    with pytest.raises(ValueError, match="goal of 'spread' is 'zero', not 'min' or 'max'"):
        own.greater_is_better  # noqa: B018


def test_what_a_subclass_leaves_out_is_named():
    for ask in (lambda e: e.columns, lambda e: e(None)):
        with pytest.raises(NotImplementedError, match=r"Evaluation has no `(columns|__call__)`"):
            ask(bt.Evaluation())


def test_a_function_gets_its_columns_from_its_keys(tmp_path):
    numbers = iter([{"loss": 1.0}, {"loss": 2.0, "extra": 3.0}])
    results = bt.Results("own", lambda model: next(numbers))
    assert results.columns == []
    results.add("target", "target", None)
    results.add("mine", "unlearned", None)
    assert results.columns == [{"name": "loss"}, {"name": "extra"}]
    table = bt.format_table(results.columns, results.rows)
    assert "loss" in table and "extra" in table and "2.0" in table
    results.save(tmp_path, {})
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "loss" in html and "extra" in html


def test_what_is_no_evaluation_is_refused():
    half = type("Half", (), {"columns": [], "__call__": lambda self, model: {}})()
    for given in (3, "muse", Own, None, half):
        with pytest.raises(TypeError, match=r"An evaluation is a `blur_trainer\.Evaluation` or a function"):
            as_evaluation(given)


def test_the_best_model_by_the_name_of_an_evaluation(tmp_path):
    def args(best):
        return bt.UnlearningConfig(str(tmp_path), use_cpu=True, metric_for_best_model=best)

    asked = args("eval_own")
    assert list(settle_benchmarks({"own": Own()}, asked)) == ["own"]
    assert (asked.metric_for_best_model, asked.greater_is_better) == ("own_forget_loss", True)
    asked = args("own_spread")  # a metric of it, as given
    settle_benchmarks({"own": Own()}, asked)
    assert asked.metric_for_best_model == "own_spread"
    with pytest.raises(ValueError, match="FunctionEvaluation has no columns yet"):
        settle_benchmarks({"own": FunctionEvaluation(dict)}, args("own"))

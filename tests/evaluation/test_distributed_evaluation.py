"""Two processes (gloo, CPU) evaluate as one does: all numbers and texts, on every engine, and the best checkpoint.

`pytest -m full`: also the models that a sharding engine treats as it does another one.
"""

import json

import pytest
import torch
from support import distributed_evaluation_worker as worker
from support.cases import chosen
from support.processes import SUPPORT, forked

from blur_trainer.evaluation.distributed import in_shares

pytestmark = pytest.mark.distributed
FULL = (
    *("ddp-tied", "fsdp2-tied", "fsdp2-lora", "zero3-tied", "zero3-lora"),
    *("ddp-train-lora", "fsdp2-train-full", "fsdp2-train-lora", "zero3-train-lora"),
)


def cases(*kinds):
    every = [f"{engine}-{kind}" for engine in worker.NAMES for kind in kinds]
    return [pytest.param(case, marks=pytest.mark.full) if case in FULL else case for case in every]


@pytest.fixture(scope="module")
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    script = SUPPORT / "distributed_evaluation_worker.py"
    wanted = [*chosen(request, "case"), *(f"{engine}-full" for engine in chosen(request, "engine"))]
    wanted += [f"ddp-{model}" for model in chosen(request, "attack")]
    alone = {"full", *chosen(request, "model"), *chosen(request, "trained")}
    worker.memorize({case.split("-")[-1] for case in wanted} | alone, str(folder))
    forked(script, str(folder), ",".join(dict.fromkeys(wanted)), DS_ACCELERATOR="cpu")
    return folder


@pytest.fixture(scope="module")
def alone(request, folder):
    """By one process: what is evaluated of each model, what each training logs and ends with."""
    cases = [case.split("-") for case in chosen(request, "case")]
    names = {"full", *chosen(request, "model"), *(case[-1] for case in cases if "train" not in case)}
    training = {*chosen(request, "trained"), *(case[-1] for case in cases if "train" in case)}
    models = {name: worker.results(worker.build(name, str(folder)), str(folder)) for name in sorted(names)}
    attacked = {name: worker.attacked(worker.build(name, str(folder))) for name in chosen(request, "attack")}
    trained = {name: worker.train("ddp", name, str(folder)) for name in sorted(training)}
    return json.loads(json.dumps({"models": models, "attacked": attacked, "trained": trained}))


def of_both(folder, name):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("case", cases(*worker.MODELS))
def test_every_process_has_the_answers_of_one_to_the_last_bit(folder, alone, case):
    model = case.split("-")[-1]
    for found in of_both(folder, case):
        for key in alone["models"][model].keys() - {"forwards", "harness forwards", "bars"}:
            assert found[key] == alone["models"][model][key], key


@pytest.mark.parametrize("model", [pytest.param("tied", marks=pytest.mark.full), "full", "lora"])
def test_the_comparison_would_see_a_difference(alone, model):
    found = alone["models"][model]
    assert found["muse"]["forget_verbmem"] > 5 and found["muse"]["retain_knowmem"] > 5
    assert found["muse"]["privleak_auc"] == found["auc"] and 0 < found["auc"] < 1
    assert len(set(found["texts of 6"])) > 3
    assert found["own"]["forget_rouge"] > 0.05 and found["own"]["forget_loss"] > 0.01
    assert found["leaks"]["leak@1"] > 0 and len({one["score"] for one in found["leak details"]}) > 1
    assert [len(row) for row in found["logps of 7"]] == [len(row) - 1 for row in worker.ROWS]


@pytest.mark.parametrize("attack", [pytest.param("tied", marks=pytest.mark.full), "full", "lora"])
def test_every_process_attacks_as_one_does(folder, alone, attack):
    for found in of_both(folder, f"attacked-{attack}"):
        assert found == alone["attacked"][attack]
    before, after = (point["metrics"] for point in found["relearning"][0]["points"])
    assert before["privleak_auc"] != after["privleak_auc"] or before["forget_verbmem"] != after["forget_verbmem"]


@pytest.mark.parametrize("engine", worker.NAMES)
def test_each_process_does_its_share(folder, alone, engine):
    """Of three batches, one and none. Where a forward pass needs all processes, all run equally many."""
    assert alone["models"]["full"]["forwards"] == [3, 1, 0]
    first, second = (found["forwards"] for found in of_both(folder, f"{engine}-full"))
    assert first == [2, 1, 0]
    assert second == ([1, 0, 0] if engine == "ddp" else [2, 1, 0])


@pytest.mark.parametrize("engine", worker.NAMES)
def test_the_harness_is_shared_where_a_forward_pass_needs_one_process(folder, alone, engine):
    """Five questions, and one: of that each process does the whole. `acc` itself is compared above."""
    pytest.importorskip("lm_eval", reason="needs the extra wmdp")
    whole = alone["models"]["full"]["harness forwards"]
    for found in of_both(folder, f"{engine}-full"):
        assert found["harness forwards"]["retain_one"] == whole["retain_one"]
        share, five = found["harness forwards"]["forget_five"], whole["forget_five"]
        assert share < five if engine == "ddp" else share == five
    assert 0 < alone["models"]["full"]["harness"]["forget_five_acc"] < 1


@pytest.mark.parametrize("engine", worker.NAMES)
def test_one_process_shows_progress_and_none_draws_random_numbers(folder, alone, engine):
    first, second = of_both(folder, f"{engine}-full")
    assert first["bars"] and not second["bars"] and alone["models"]["full"]["bars"]
    assert not first["draws"] and not second["draws"]


@pytest.mark.parametrize("case", cases(*(f"train-{model}" for model in worker.TRAINED)))
def test_training_evaluates_as_one_process_and_ends_with_the_best_weights(folder, alone, case):
    one = alone["trained"][case.split("-")[-1]]
    for found in of_both(folder, case):
        assert len(found["history"]) == len(one["history"])
        for entry, expected in zip([*found["history"], found["after"]], [*one["history"], one["after"]], strict=True):
            # the benchmarks round to the same texts; losses and weights are sums in another order
            assert entry == pytest.approx(expected, rel=1e-5)
        assert found["best"] == one["best"] == "checkpoint-2"
        for name, values in one["weights"].items():
            assert found["weights"][name] == pytest.approx(values, abs=1e-5), name


@pytest.mark.parametrize("trained", ["full", pytest.param("lora", marks=pytest.mark.full)])
def test_the_best_weights_are_neither_the_first_nor_the_last(alone, trained):
    steps = [entry for entry in alone["trained"][trained]["history"] if "eval_five_loss" in entry]
    losses = [entry["eval_five_loss"] for entry in steps]
    assert alone["trained"][trained]["after"]["eval_five_loss"] == losses[1] != losses[2] != losses[0] != losses[1]


def test_results_come_in_the_order_of_the_indices():
    seen = []
    found = in_shares(torch.nn.Linear(1, 1), [[2, 0], [1]], lambda indices: seen.append(indices) or indices, None)
    assert found == [0, 1, 2] and seen == [[2, 0], [1]]


def test_a_batch_must_answer_for_each_of_its_indices():
    with pytest.raises(ValueError, match="zip"):
        in_shares(torch.nn.Linear(1, 1), [[0, 1]], lambda indices: indices[:1], None)

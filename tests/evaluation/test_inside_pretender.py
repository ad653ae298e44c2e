"""A model that hides what it knows behind its last layer is found out; one that never knew is not accused."""

import copy
import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from support.models import collate
from support.tiny_tokenizer import tiny_tokenizer

import blur_trainer as bt
from blur_trainer.evaluation.inside.choices import ChoiceProbes
from blur_trainer.evaluation.inside.patching import unlearning_depth
from blur_trainer.evaluation.inside.probes import probe_layers
from blur_trainer.evaluation.scoring import generate_ids
from blur_trainer.report.figures import DARK
from blur_trainer.report.figures.inside import draw_inside
from blur_trainer.report.seeds import mean_and_spread
from blur_trainer.toy.model import tiny_llama

LAYERS, RETAIN, FORGET, STEPS = 3, 40, 12, 40
TOKENIZER = tiny_tokenizer(pad="<pad>")
UPPER, LOWER = TOKENIZER.convert_tokens_to_ids(["A", "a"])  # an answer is a word such as "Cd"
PROMPT = 4


def fact(subject, upper, lower):
    """A subject of two tokens, a token of its own for "is", and an answer of two."""
    ids = [0, 100 + subject // 60, 180 + subject % 60, 99, UPPER + upper, LOWER + lower, 1]
    return {"input_ids": ids, "labels": [-100] * PROMPT + ids[PROMPT:]}


def facts(count, seed):
    generator = torch.Generator().manual_seed(seed)
    subjects = torch.randperm(3600, generator=generator)[:count].tolist()
    words = torch.randint(0, 12, (count, 2), generator=generator).tolist()
    return [fact(subject, *word) for subject, word in zip(subjects, words, strict=True)]


def refusal(row):
    answer = [UPPER + 20, LOWER + 20, 1]
    return {"input_ids": row["input_ids"][:PROMPT] + answer, "labels": [-100] * PROMPT + answer}


def learn(model, rows, parts=lambda model: [model], rate=8e-3, steps=STEPS):
    """A copy of the model some parts of which learnt the rows by heart, all in one batch."""
    model = copy.deepcopy(model).requires_grad_(False)
    chosen = [weight for part in parts(model) for weight in part.requires_grad_(True).parameters()]
    optimizer, batch = torch.optim.AdamW(chosen, betas=(0.9, 0.95), weight_decay=0.0), collate(rows)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        optimizer.zero_grad()
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(chosen, 1.0)
        optimizer.step()
    return model.requires_grad_(True).eval()


def last_layer_and_head(model):
    return [model.model.layers[-1], model.lm_head]


@pytest.fixture(scope="module")
def world():
    rows = facts(RETAIN + 2 * FORGET, seed=0)
    retain, forget, other = rows[:RETAIN], rows[RETAIN:-FORGET], rows[-FORGET:]
    base = learn(tiny_llama(TOKENIZER, hidden_size=32, num_layers=LAYERS, num_heads=2), retain)
    target = learn(base, retain + forget)
    return SimpleNamespace(
        retain=retain,
        forget=forget,
        target=target,
        pretender=learn(target, retain + [refusal(row) for row in forget], last_layer_and_head, rate=1e-2),
        retrained=learn(base, retain, steps=STEPS // 2),
        other=learn(base, retain + other),  # never saw the forget set either
    )


def says(model, rows):
    """The share of answers that the model gives word by word."""
    written = generate_ids(model, TOKENIZER, [row["input_ids"][:PROMPT] for row in rows], max_new_tokens=3)
    return sum(ids == row["input_ids"][PROMPT:-1] for ids, row in zip(written, rows, strict=True)) / len(rows)


def probed(world, model, **how):
    how = {"learning_rate": 2e-2, "progress": False} | how
    return probe_layers(model, TOKENIZER, train=world.retain, forget=world.forget, retrained=world.retrained, **how)


def test_greedy_answers_do_not_see_the_pretender(world):
    assert says(world.target, world.forget) == 1
    for model in (world.pretender, world.retrained, world.other):
        assert says(model, world.forget) == 0 and says(model, world.retain) > 0.95


def test_probes_see_it_and_accuse_no_one_else(world):
    found = probed(world, world.pretender, target=world.target, max_new_tokens=3)
    assert found.layers[:-1] == found.knowing[: LAYERS - 1]  # all below the layer that it moved
    probes = {model.name: model for model in found.models}
    unlearned, target, retrained = (probes[name] for name in ("unlearned", "target", "retrained"))
    assert max(unlearned.forget_loss[1], target.forget_loss[1]) < 0.5 < 3 < min(retrained.forget_loss)
    # the model's own greedy answers no longer have it: those of the probe of a lower layer do
    assert min(unlearned.forget_rouge[1], target.forget_rouge[1]) > 0.8 > 0.2 > max(retrained.forget_rouge)
    assert probed(world, world.other).knowing == []


def test_the_depth_of_each(world):
    babbler = copy.deepcopy(world.target)
    with torch.no_grad():
        babbler.lm_head.weight.copy_(world.target.lm_head.weight.roll(1, dims=0))
    assert says(babbler, world.forget) == 0

    def score(model):
        return unlearning_depth(world.target, model, world.retrained, world.forget, progress=False).score

    assert score(world.target) == score(babbler) == pytest.approx(0, abs=1e-6)  # of the head it takes no notice
    assert score(world.pretender) < 0.4
    assert score(world.other) > 0.8
    assert score(world.retrained) == pytest.approx(1)


def test_it_reaches_the_report(world, tmp_path, capsys):
    results = bt.Results("Own", lambda model: {"forget_said": says(model, world.forget)})
    how = {"layers": [1, 2], "max_epochs": 2, "progress": True}
    probes = probed(world, world.pretender, target=world.target, **how)
    depth = unlearning_depth(world.target, world.pretender, world.retrained, world.forget[:3], layers=[1, 2])
    bars = capsys.readouterr().err
    assert "Probes: retrained, layer 2" in bars and "6/6" in bars and "Patching: 100%" in bars
    results.add_inside(
        probes=probes, depth=depth, choices={"retrained": ChoiceProbes([1, 2], [0.3, 0.25], [0, 0], 0.25)}
    )
    content = results.save(tmp_path, settings={})
    page = bt.write_report(tmp_path).read_text()
    assert (tmp_path / "figures" / "inside.png").stat().st_size > 1000
    loss = {model.name: model.forget_loss for model in probes.models}
    for words in (
        "<h2>Inside, layer by layer</h2>",
        "Layers of the unlearned model that know: 1, 2.",
        f"target {loss['target'][0]:.2f}, {loss['target'][1]:.2f}; unlearned {loss['unlearned'][0]:.2f}",
        f"Unlearning Depth Score {depth.score:.2f}",
        f"retrained {depth.retrained[0]:.2f}, {depth.retrained[1]:.2f}.",
        "retrained 0.30, 0.25.",
    ):
        assert words in page
    assert "inside" not in mean_and_spread([json.loads(json.dumps(content))] * 2)


WRONG = [
    *([], {"probes": []}, {"probes": {"layers": [0]}}, {"probes": {"layers": [0], "models": [{"name": "x"}]}}),
    *({"depth": 3}, {"depth": {"score": 1}}, {"choices": [{"name": "x", "layers": [0]}]}),
]


@pytest.mark.parametrize("inside", WRONG)
def test_the_report_refuses_other_data(inside, tmp_path):
    (tmp_path / "metrics.json").write_text(json.dumps({"rows": [], "inside": inside}))
    with pytest.raises(ValueError, match="must be a"):
        bt.write_report(tmp_path)


def test_heat_maps_of_what_is_missing_or_large():
    layers = list(range(20))  # too many for a number in each cell: a scale stands beside
    models = [{"name": name, "forget_loss": [None, math.inf, *layers[2:]]} for name in ("$a$", "_b", "retrained")]
    depth = {"layers": [3], "unlearned": [math.nan], "retrained": [0.0], "score": math.nan}
    inside = {"probes": {"layers": layers, "models": models, "knowing": None}, "depth": depth}
    drawing = draw_inside({"inside": inside}, DARK)
    assert len(drawing.figure.axes) == 3
    drawing.figure.savefig(io.BytesIO())
    assert "Layers of" not in drawing.caption and "undefined" in drawing.caption
    assert "layers 0 to 19" in drawing.numbers and "layer 3: target 0.00; unlearned nan" in drawing.numbers
    assert draw_inside({}, DARK) is None

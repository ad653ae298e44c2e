"""Every method of run_tofu.py: its settings build, and it makes a step that changes the model."""

import pytest
import torch
from support.models import tiny_llama
from support.tiny_tokenizer import tiny_tokenizer
from transformers import LlamaForCausalLM

from blur_trainer.recipes import recipe, recipe_names
from blur_trainer.scripts.tofu import HUB, TINY, defaults, training_sets
from blur_trainer.scripts.tofu_methods import FORGET_ONLY, METHODS

ROWS = [{"question": f"Who painted the mural {i}?", "answer": f"Mara Velin painted it, number {i}."} for i in range(8)]


class Script:
    template, augment_forget, augment_retain = "plain", "none", "none"


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    """A model's folder and its tokenizer."""
    folder, tokenizer = str(tmp_path_factory.mktemp("target")), tiny_tokenizer(pad="<pad>")
    config = tiny_llama().config
    config.vocab_size, config.max_position_embeddings = len(tokenizer), 128
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder, tokenizer


@pytest.mark.parametrize("method", METHODS)
def test_a_method_makes_a_step(method, target, tmp_path):
    folder, tokenizer = target
    settings = defaults(method, tiny=True) | {"output_dir": str(tmp_path), "max_steps": 1, "eval_strategy": "no"}
    settings |= (
        {"use_cpu": True, "disable_tqdm": True, "num_assistant_layers": 1} if method == "uld" else {"use_cpu": True}
    )
    made = METHODS[method].trainer
    sets = training_sets(method, {"forget": ROWS[:4], "retain": ROWS[4:]}, Script())
    assert (sets["retain_dataset"] is None) == (method in FORGET_ONLY)
    if method == "blur-target":
        settings["forget_level"] = 3.0  # the example measures one
    trainer = made(folder, made.config_class(**settings), processing_class=tokenizer, **sets)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(not torch.equal(old, new) for old, new in zip(before, trainer.model.parameters(), strict=True))


@pytest.mark.parametrize("method", METHODS)
def test_real_models_get_what_makes_the_method_and_no_tiny_setting(method):
    settings = defaults(method, tiny=False)
    assert settings == {**HUB, **METHODS[method].settings}
    assert METHODS[method].trainer.config_class(**settings).num_train_epochs == HUB["num_train_epochs"]
    assert defaults(method, tiny=True).keys() >= TINY.keys()


def test_the_method_of_a_recipe_is_one_of_them():
    named = {recipe("tofu", name)["method"] for name in recipe_names("tofu")}
    assert named <= METHODS.keys() and {"undial", "pdu", "gru", "altpo", "uld"} <= named

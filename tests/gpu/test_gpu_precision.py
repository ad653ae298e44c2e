"""What a GPU chooses by itself: bfloat16 autocast, checkpointing, the dtype of a model given by name."""

import pytest
import torch
from peft import LoraConfig
from support.device import CARD, DEVICE, needs_card
from support.models import examples, tiny_llama
from support.runs import settings

from blur_trainer import BLURTrainer


@needs_card("bfloat16 is chosen on a GPU only")
@pytest.mark.parametrize("lora", [False, True])
def test_a_model_by_name_trains_as_the_page_says(tmp_path, lora):
    tiny_llama(0).save_pretrained(tmp_path / "model")
    args = settings(tmp_path / "run", use_cpu=not CARD, max_steps=2)
    assert args.bf16 and args.activation_checkpointing
    peft_config = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM") if lora else None
    trainer = BLURTrainer(str(tmp_path / "model"), args, examples(4), examples(4, seed=1), peft_config=peft_config)
    trainer.train()
    dtypes = {(p.requires_grad, p.dtype) for p in trainer.model.parameters()}
    assert dtypes == {(True, torch.float32), *([(False, torch.bfloat16)] if lora else [])}
    assert {p.device.type for p in trainer.model.parameters()} == {DEVICE.type}

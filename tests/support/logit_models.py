"""Models of several architectures, an assistant that has learned something, and prompts for both."""

import torch
import transformers
from support.models import VOCAB

CLOSE = {"rtol": 1e-4, "atol": 1e-5}
MODES = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 0.8, "top_k": 0},
    "beam": {"do_sample": False, "num_beams": 3},
    "penalized": {"do_sample": False, "repetition_penalty": 1.3},
}


def tiny(architecture: str, layers: int = 3, seed: int = 0):
    """One of transformers' architectures, in eval mode, with weights wide enough to tell tokens apart."""
    sizes = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 64, "initializer_range": 0.2}
    sizes |= {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}  # texts of one length
    if architecture in ("Llama", "Mistral", "Qwen2", "Gemma2"):
        sizes["num_key_value_heads"] = 1
    if architecture in ("Mistral", "Gemma2"):
        sizes["sliding_window"] = 6  # shorter than the texts below
    if architecture == "Gemma2":
        sizes["head_dim"] = 8
    torch.manual_seed(seed)
    config = getattr(transformers, f"{architecture}Config")(**sizes)
    head = "LMHeadModel" if architecture == "GPT2" else "ForCausalLM"
    return getattr(transformers, architecture + head)(config).eval()


def learned(assistant, seed: int = 1):
    """An adapter that says something: PEFT begins with B = 0."""
    torch.manual_seed(seed)
    for name, parameter in assistant.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return assistant.eval()


def prompts(lengths=(9, 5, 12), seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCAB, (1, length), generator=generator) for length in lengths]


def padded(rows: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """On the left, as for generation."""
    width = max(row.shape[1] for row in rows)
    gaps = [torch.zeros(1, width - row.shape[1], dtype=torch.long) for row in rows]
    ids = torch.cat([torch.cat([gap, row], 1) for gap, row in zip(gaps, rows, strict=True)])
    mask = torch.cat(
        [torch.cat([gap, torch.ones_like(row)], 1) for gap, row in zip(gaps, rows, strict=True)],
    )
    return {"input_ids": ids, "attention_mask": mask}


def generate(model, batch, **kwargs):
    torch.manual_seed(0)
    with torch.no_grad():
        return model.generate(**batch, max_new_tokens=8, return_dict_in_generate=True, output_logits=True, **kwargs)

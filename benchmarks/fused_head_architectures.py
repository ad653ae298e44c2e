"""Which architectures' log-probabilities by TRL's fused LM head equal those from their logits: `models/fused_heads.py`.

    python benchmarks/fused_head_architectures.py            # every one that `AutoModelForCausalLM` loads: a minute
    python benchmarks/fused_head_architectures.py llama mpt  # these

Each is built small, with random weights, and with odd values where its configuration caps or scales logits. Those whose
configuration does not take these sizes are listed with the reason, and count as not compared.
"""

import sys
from typing import Any

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING
from trl.trainer.utils import add_fused_lm_head

from blur_trainer.models.fused_heads import CHECKED
from blur_trainer.models.logps import sequence_logps

BASIC = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
BASIC |= {"num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "is_decoder": True}
MORE = {"max_position_embeddings": 64, "head_dim": 8, "n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64}
MORE |= {"num_local_experts": 2, "num_experts": 2, "n_routed_experts": 2, "num_experts_per_tok": 1, "d_model": 32}
MORE |= {"moe_intermediate_size": 16, "n_heads": 4, "n_layers": 2, "num_layers": 2, "num_heads": 4, "ffn_dim": 48}
MORE |= {"word_embed_proj_dim": 32, "max_seq_len": 64, "sliding_window": 8, "window_size": 8, "rotary_dim": 4}
EXPERTS = {"n_routed_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "n_group": 1, "topk_group": 1}
EXPERTS |= {"first_k_dense_replace": 1, "n_shared_experts": 1}
LATENT = {"q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
LATENT |= {"num_key_value_heads": 4}
STATES = {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 2, "chunk_size": 8, "expand": 2}
HYBRID = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 1, "mamba_d_state": 8, "mamba_expand": 2}
KINDS = ["sliding_attention", "full_attention"]
NARROW = {"num_hidden_layers": 4, "layer_types": KINDS * 2, "num_kv_shared_layers": 2, "intermediate_size": [48] * 4}
NARROW |= {"vocab_size_per_layer_input": 64, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "altup_num_inputs": 2}
NARROW |= {"activation_sparsity_pattern": [0.0] * 4, "head_dim": 8}
#: sizes of architectures that do not take those above
SIZES_OF: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("deepseek_v2", "deepseek_v3", "glm4_moe_lite", "youtu"), LATENT | EXPERTS),
    "minicpm3": LATENT,
    "dots1": EXPERTS,
    "lfm2_moe": {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16, "num_dense_layers": 1}
    | {"layer_types": ["full_attention", "conv"]},
    "mamba2": STATES,
    "bamba": HYBRID | {"attn_layer_indices": [1]},
    "codegen": {"n_embd": 32, "n_head": 4, "n_layer": 2, "n_positions": 64, "n_ctx": 64, "rotary_dim": 4},
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "window_size": 8},
    "gemma3n_text": NARROW,
    "gemma4_text": {"layer_types": KINDS, "head_dim": 8, "global_head_dim": 8, "hidden_size_per_layer_input": 0},
}
CAPS = {"final_logit_softcapping": 3.0, "logits_soft_cap": 3.0, "output_logit_soft_cap": 3.0, "dim_model_base": 16}
SCALES = {"logit_scale": 0.37, "output_multiplier": 0.37, "lm_head_multiplier": 0.37, "logits_scaling": 2.7}
PROBLEMS = (
    ValueError,
    TypeError,
    AttributeError,
    KeyError,
    RuntimeError,
    IndexError,
    ImportError,
    StrictDataclassError,
)


def configuration(name: str) -> Any:
    """A small one, of the sizes that its class has."""
    kind = CONFIG_MAPPING[name]
    known = set(dir(kind()))
    sizes = {key: value for key, value in (BASIC if name in SIZES_OF else BASIC | MORE).items() if key in known}
    try:
        config = kind(**sizes | SIZES_OF.get(name, {}))
    except PROBLEMS:
        config = kind(**{key: value for key, value in BASIC.items() if key in known})
    for key, value in (CAPS | SCALES).items():
        if hasattr(config, key) and not isinstance(getattr(type(config), key, None), property):
            setattr(config, key, value)
    return config


@torch.no_grad()
def difference(config: Any) -> float:
    """The largest relative difference of a log-probability."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        parameter.normal_(0, 0.25) if parameter.dim() > 1 else parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.randint(3, 64, (2, 9))
    batch, labels = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids.clone()
    labels[:, :2] = -100
    plain = sequence_logps(model(**batch, use_cache=False).logits, labels)
    if model.base_model is model or config.get_text_config(decoder=True) is not config:
        raise ValueError("no backbone below the head, or several models")
    add_fused_lm_head(model)
    fused = model(**batch, labels=labels, fused_lm_head=True).log_probs.sum(-1)
    return ((fused - plain).abs() / plain.abs()).max().item()


def main() -> None:
    transformers.logging.set_verbosity_error()
    wanted = sys.argv[1:] or [name for name, kind in CONFIG_MAPPING.items() if kind in MODEL_FOR_CAUSAL_LM_MAPPING]
    for name in wanted:
        try:
            found = difference(configuration(name))
            verdict = f"{'equal' if found < 1e-4 else 'DIFFERS'} {found:.1e}"
        except PROBLEMS as error:
            verdict = f"not compared: {' '.join(str(error).split())[:80]}"
        print(f"{name:24} {'listed' if name in CHECKED else '':7} {verdict}", flush=True)


if __name__ == "__main__":
    main()

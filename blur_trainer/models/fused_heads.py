"""Where TRL's fused LM head gives the log-probabilities of the logits, and from which size of the logits it is used.

The architectures: a model of each, small and with random weights, a soft cap and a scale of the logits where its
configuration has one: equal to 1e-4 (transformers 5.23, TRL 1.16; benchmarks/fused_head_architectures.py). Others
compute something before or after the head that the fused one does not know (BERT's transformation, RecurrentGemma's and
xLSTM's soft cap, MPT's scale), or were not tried.
"""

import math

#: By default GPUs use the fused head from this size of the float32 logits on, in bytes. Measured on an H100
#: (docs/benchmarks.md, "Fused LM head" and "A step of 1B"): with 2.1e9 (2 x 2048 tokens, 128 256 words) it takes as
#: long as logits and 4.1 GiB less. With 1.05e9 (2 x 1024 tokens) a step of 1B takes 1.43 times as long, because TRL
#: picks the answer tokens by a mask, for which the host waits for the GPU. That saves 1.3 GiB.
FUSED_FROM = 2e9

_MODEL_TYPES = (
    "afmoe apertus arcee aria_text bailing_hybrid bamba beam biogpt bitnet bloom codegen cohere cohere2 cohere2_moe "
    "cpmant ctrl cwm deepseek_v2 deepseek_v3 deepseek_v4 diffllama doge dots1 ernie4_5 ernie4_5_moe exaone4 "
    "exaone_moe falcon falcon_h1 falcon_mamba flex_olmo flint gemma gemma2 gemma3_text gemma3n_text gemma4_text glm "
    "glm4 glm4_moe glm4_moe_lite gpt-sw3 gpt2 gpt_bigcode gpt_neo gpt_neox gpt_neox_japanese gpt_oss gptj granite "
    "granite_swa granitemoe granitemoe_swa granitemoeshared helium hrm_text hunyuan_v1_dense hunyuan_v1_moe hy_v3 "
    "hy_v4 hyperclovax inkling2_text internlm3 iquestcoder jais2 jamba jetmoe kimi_linear kolibri1 laguna lfm2 "
    "lfm2_moe lfm3 llama mamba mamba2 mellum mimo_v2_flash minicpm3 minimax minimax_m2 minimax_m3_vl_text ministral "
    "ministral3 mistral mixtral nanochat nemotron nemotron_h olmo olmo2 olmo3 olmo_hybrid olmoe openai-gpt opt "
    "persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_5_moe_text qwen3_5_text qwen3_moe qwen3_next "
    "qwen4_exp_text rwkv seed_oss smollm3 solar_open stablelm starcoder2 vaultgemma xglm xlm youtu zaya"
)
#: `config.model_type`
CHECKED = frozenset(_MODEL_TYPES.split())


def logits_bytes(tokens: int, vocabulary: int) -> int:
    """Of float32 logits."""
    return 4 * tokens * vocabulary


def fused_from(fused: bool | None, gpu: bool, largest: float, by_batch: bool) -> float:
    """The size of the logits, in bytes, from which on the fused head is used. `inf`: never.

    `fused` is `UnlearningConfig.fused_lm_head`. `largest` is the size for the largest batch. `by_batch=False`: all
    batches go the same way, which the largest one decides.
    """
    if fused is not None:
        return 0.0 if fused else math.inf
    if not gpu or largest < FUSED_FROM:
        return math.inf
    return FUSED_FROM if by_batch else 0.0

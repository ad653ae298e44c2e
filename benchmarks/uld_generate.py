"""Tokens per second of the logit-difference model beside its target alone, in every form that it can be generated in.

    python benchmarks/uld_generate.py                        # this CPU, one thread: about eight CPU minutes
    python benchmarks/uld_generate.py --batch-sizes 1 --rounds 3
    python benchmarks/uld_generate.py --device cuda --hidden 2048 --layers 16 4 --rounds 3

    target      the target's own `generate`
    model       `LogitDifferenceModel.generate`: both parts with a cache
    processor   the target's `generate` with `ULDLogitsProcessor`
    no cache    both models read the whole text anew for each token and give logits of all of it, as ULD's code does
                where `use_cache` is off in the checkpoint's configuration

All forms take turns within a round, in rotating order, on one model with random weights. One text of the greatest
length serves every length: the clock is read after each token. Without a cache only every 32nd token is made, and
stands for its neighbors. Speeds are medians over the rounds, ratios are medians of the ratios within a round.

The limit is that of the arithmetic: 1 / (1 + parameters that the assistant multiplies / those that the target does),
counting layers, head and adapter, not the embedding, which is looked up.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import machine
from rows import row, write_rows
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.utils import logging

from blur_trainer.models.logit_composition import ULDLogitsProcessor, logit_difference
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant

WEIGHT, FILTER, PROMPT, STRIDE = -0.8, 0.01, 16, 32
Form = Callable[[torch.Tensor], list[float]]


def now(device: str) -> float:
    """CPU seconds of this process; on a GPU seconds on the wall, once it is done."""
    if device == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Clock(StoppingCriteria):
    """Reads the clock after each token; stops nothing."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.times = [now(device)]

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: object) -> torch.Tensor:
        self.times.append(now(self.device))
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def build(vocabulary: int, hidden: int, layers: int, kept: int) -> LogitDifferenceModel:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=8 * hidden // 3,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        bos_token_id=1,
        eos_token_id=None,  # every text has the full length
        pad_token_id=0,
    )
    target = LlamaForCausalLM(config).eval()
    model = LogitDifferenceModel(
        LogitDifferenceConfig(weight=WEIGHT, top_logit_filter=FILTER), target, lora_assistant(target, kept)
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.02)
    return model


def active(model: nn.Module) -> int:
    """Parameters that a token is multiplied with."""
    embedding = sum(p.numel() for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters())
    return sum(p.numel() for p in model.parameters()) - embedding


def generated(model: nn.Module, tokens: int, **kwargs: object) -> Form:
    def form(ids: torch.Tensor) -> list[float]:
        clock = Clock(ids.device.type)
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=tokens,
            do_sample=False,
            stopping_criteria=StoppingCriteriaList([clock]),
            **kwargs,
        )
        return [t - clock.times[0] for t in clock.times[1:]]

    return form


def recomputed(model: LogitDifferenceModel, tokens: int) -> Form:
    def form(ids: torch.Tensor) -> list[float]:
        shape, device = (ids.shape[0], tokens + PROMPT), ids.device.type
        seconds, texts = 0.0, torch.randint(3, model.target.config.vocab_size, shape).to(device)
        times = []
        for made in range(0, tokens, STRIDE):
            seen, start = texts[:, : PROMPT + made + STRIDE // 2], now(device)
            target = model.target(seen, use_cache=False).logits
            assistant = model.assistant(input_ids=seen, use_cache=False).logits
            logit_difference(target, assistant, WEIGHT, FILTER)[:, -1].argmax(-1)
            one = now(device) - start
            times += [seconds + (i + 1) * one for i in range(STRIDE)]
            seconds = times[-1]
        return times

    return form


def compare(
    model: LogitDifferenceModel, batch_size: int, options: argparse.Namespace
) -> tuple[list[str], list[dict[str, Any]]]:
    """Lines of the table, and the rows behind them."""
    tokens = max(options.lengths)
    ids = torch.randint(3, options.vocabulary, (batch_size, PROMPT), generator=torch.Generator().manual_seed(0))
    ids = ids.to(options.device)
    processor = LogitsProcessorList([ULDLogitsProcessor(model.assistant, WEIGHT, FILTER)])
    forms: dict[str, Form] = {
        "target": generated(model.target, tokens),
        "model": generated(model, tokens),
        "processor": generated(model.target, tokens, logits_processor=processor),
        "no cache": recomputed(model, tokens),
    }
    rounds: list[dict[str, list[float]]] = []
    for round_ in range(options.rounds + 1):
        shift = round_ % len(forms)
        names = [*forms][shift:] + [*forms][:shift]
        times = {name: forms[name](ids) for name in names}
        if round_ > 0:
            rounds.append(times)
    limit = 1 / (1 + active(model.assistant) / active(model.target))
    lines, found = [], []
    for length in options.lengths:
        speed = {n: statistics.median(batch_size * length / r[n][length - 1] for r in rounds) for n in forms}
        ratio = {n: statistics.median(r["target"][length - 1] / r[n][length - 1] for r in rounds) for n in forms}
        faster = statistics.median(r["no cache"][length - 1] / r["model"][length - 1] for r in rounds)
        cells = [f"{speed['target']:.0f}", *(f"{speed[n]:.0f}, {ratio[n]:.2f}" for n in forms if n != "target")]
        lines.append(f"| {batch_size}, {length} | {' | '.join(cells)} | {ratio['model'] / limit:.2f} | {faster:.1f} |")
        name = f"batch {batch_size}, {length} tokens"
        found.append(row(f"{name}: model", ratio["model"] / limit, "of the limit", least=0.9))
        found.append(row(f"{name}: processor", ratio["processor"] / limit, "of the limit"))
        found.append(row(f"{name}: target", speed["target"], "tokens/s"))
        found.append(row(f"{name}: model over no cache", faster))
    return lines, found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 2], help="of the target, of the assistant")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(1)
    with torch.device(options.device):  # random weights of a large model take long on a CPU
        model = build(options.vocabulary, options.hidden, *options.layers)
    parts = active(model.target), active(model.assistant)
    print(machine(options.device))
    print(
        f"Llama, {model.target.num_parameters() / 1e6:.1f}M parameters, {options.layers[0]} layers, the assistant's "
        f"{options.layers[1]} with LoRA 16. Active: {parts[0] / 1e6:.1f}M, {parts[1] / 1e6:.1f}M; limit of the ratio "
        f"{1 / (1 + parts[1] / parts[0]):.3f}"
    )
    print("| batch, new tokens | target: tokens/s | model | processor | no cache | model / limit | model : no cache |")
    print("|---|---|---|---|---|---|---|")
    found: list[dict[str, Any]] = []
    for batch_size in options.batch_sizes:
        lines, more = compare(model, batch_size, options)
        print("\n".join(lines), flush=True)
        found += more
        write_rows(options.json, found)


if __name__ == "__main__":
    main()

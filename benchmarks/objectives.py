"""What a step costs with each objective: to forget, against gradient ascent's; to retain, against NLL's.

    python benchmarks/objectives.py                             # CPU, all objectives of the tables
    python benchmarks/objectives.py --only npo jsd --device cuda --batch-size 8 --length 512

Every variant is a real trainer, driven one optimizer step at a time as in `step_cost.py`: a forget and a retain batch,
`sum`, AdamW. To forget: with NLL beside it; to retain: with gradient ascent beside it. So the base of both tables
is the same, ascent + NLL. Per round each variant takes one step, in rotating order, so that drift and load hit all of
them; a ratio is the median over rounds of the ratio within a round. The base itself stands in the table twice: what its
second row is away from 1 is the noise.

Aims: 1.05; 1.20 where a reference model runs; 1.05 again where its log-probabilities are precomputed. What refusals add
(a second forward and backward pass, unless they take the place of the answers) has no aim.
"""

import argparse
import math
import statistics
import tempfile
from dataclasses import fields
from typing import Any

import torch
from measuring import begin, in_turns, machine, ratio, step_options
from rows import row, write_rows
from shapes import llama
from stepping import PINNED, Steps
from transformers import LlamaForCausalLM

from blur_trainer import GradDiffConfig, GradDiffTrainer
from blur_trainer.objectives.base import Objective
from blur_trainer.objectives.by_name import FORGET_OBJECTIVES, RETAIN_OBJECTIVES

TABLES: dict[str, dict[str, type[Objective]]] = {"forget": FORGET_OBJECTIVES, "retain": RETAIN_OBJECTIVES}
BASE = {"forget": "grad_ascent", "retain": "nll"}
AGAIN, PRECOMPUTED = "again", "precomputed"
ROWS = 32


def variants(only: list[str] | None) -> list[tuple[str, str, str]]:
    """Role, name, and how: the base, each objective, and those with log-probabilities of a reference once more."""
    found = [("forget", "grad_ascent", ""), ("forget", "grad_ascent", AGAIN)]
    for role, table in TABLES.items():
        for name, kind in table.items():
            if name == BASE[role] or (only and name not in only):
                continue
            found.append((role, name, ""))
            if role == "forget" and kind.needs_reference and not kind.needs_reference_logits:
                found.append((role, name, PRECOMPUTED))
    return found


def rows(kind: type[Objective], options: argparse.Namespace, seed: int, known: bool) -> list[dict[str, Any]]:
    """Rows of one length, a quarter of them prompt; refusals as long as answers."""
    generator = torch.Generator().manual_seed(seed)

    def tokens() -> tuple[list[int], list[int]]:
        ids = torch.randint(3, options.vocabulary, (options.length,), generator=generator).tolist()
        prompt = options.length // 4
        return ids, [-100] * prompt + ids[prompt:]

    found = []
    for _ in range(ROWS):
        example: dict[str, Any] = dict(zip(("input_ids", "labels"), tokens(), strict=True))
        if kind.needs_refusal:
            example |= zip(("refusal_input_ids", "refusal_labels"), tokens(), strict=True)
        if made(kind, options).needs_level:
            example["forget_level"] = 2.0 * math.log(options.vocabulary)
        if known:
            columns = ("ref_logps", "refusal_ref_logps") if kind.needs_refusal else ("ref_logps",)
            example |= dict.fromkeys(columns, -9.0 * options.length)
        found.append(example)
    return found


def made(kind: type[Objective], options: argparse.Namespace) -> Objective:
    """With its defaults; one on activations looks at the output of the middle layer."""
    layer = {"layer": options.layers // 2 - 1} if "layer" in {field.name for field in fields(kind)} else {}
    return kind(**layer)


def steps(variant: tuple[str, str, str], options: argparse.Namespace, folder: str) -> Steps:
    role, name, how = variant
    kinds = {r: TABLES[r][name if r == role else BASE[r]] for r in TABLES}
    torch.manual_seed(0)
    with torch.device(options.device):
        model = LlamaForCausalLM(llama(options.width, options.layers, vocab_size=options.vocabulary))
    config = GradDiffConfig(
        folder,
        per_device_train_batch_size=options.batch_size,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        precompute_ref_logps=how == PRECOMPUTED,
        report_to="none",
        disable_tqdm=True,
        **PINNED,
    )
    trainer = GradDiffTrainer(
        model,
        config,
        rows(kinds["forget"], options, seed=1, known=how == PRECOMPUTED),
        rows(kinds["retain"], options, seed=2, known=False),
        forget_objective=made(kinds["forget"], options),
        retain_objective=made(kinds["retain"], options),
    )
    return Steps.of(trainer, options)


def passes(kind: type[Objective], name: str, precomputed: bool) -> str:
    """What runs for one batch of this objective beside one forward and one backward pass, in words."""
    # one whose items are the refusal's tokens reads nothing of the answers
    instead = kind.needs_refusal and kind.per == "token"
    more = []
    if kind.needs_refusal:
        more.append("refusals instead of answers" if instead else "refusals too: a second pass")
    if kind.needs_reference:
        more.append("reference known" if precomputed else "reference runs")
    if "layer" in {field.name for field in fields(kind)}:
        more.append("lower layers only")
    return ", ".join(more)


def aim(kind: type[Objective], precomputed: bool) -> float | None:
    if kind.needs_refusal and kind.per == "example":
        return None
    return 1.2 if kind.needs_reference and not precomputed else 1.05


def report(options: argparse.Namespace) -> None:
    chosen = variants(options.only)
    with tempfile.TemporaryDirectory() as folder:
        made_steps = {str(variant): steps(variant, options, f"{folder}/{n}") for n, variant in enumerate(chosen)}
        seconds = in_turns(made_steps, options.rounds)
    base, found = str(chosen[0]), []
    print(f"| role | objective | ms | over ascent + NLL (quartiles) | aim | what runs |\n{'|---' * 6}|")
    for variant in chosen:
        role, name, how = variant
        kind, precomputed = TABLES[role][name], how == PRECOMPUTED
        median, low, high = ratio(seconds, str(variant), base)
        most = aim(kind, precomputed)
        label = f"{name} {how}".strip()
        found.append(row(f"{role}: {label} / ascent + NLL", median, most=most, spread=(low, high)))
        milliseconds = 1e3 * statistics.median(seconds[str(variant)])
        verdict = "-" if most is None else f"{most:.2f} {'met' if median <= most else 'MISSED'}"
        cells = (role, f"`{name}` {how}".strip(), f"{milliseconds:.0f}", f"{median:.3f} ({low:.3f}–{high:.3f})")
        print(f"| {' | '.join(cells)} | {verdict} | {passes(kind, name, precomputed)} |", flush=True)
    write_rows(options.json, found)


def main() -> None:
    parser = step_options(__doc__, [], rounds=15, batch_size=4, length=64)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=16384)
    names = sorted({name for table in TABLES.values() for name in table})
    parser.add_argument("--only", nargs="+", choices=names, help="these objectives, and the base")
    options = begin(parser)
    print(machine(options.device))
    print(
        f"width {options.width}, {options.layers} layers, vocabulary {options.vocabulary}, {options.batch_size} x "
        f"{options.length} tokens per role, {options.rounds} rounds, {options.clock} clock\n"
    )
    report(options)
    print(f"\nAt the end: {machine(options.device)}")


if __name__ == "__main__":
    main()

"""What a step costs with each rule, against the fixed sum's; and with SAM, against two stock steps.

    python benchmarks/rules.py                                   # CPU, about two minutes on two cores
    python benchmarks/rules.py --device cuda --size 1B --batch-size 4 --length 512

Every variant is a real trainer, driven one optimizer step at a time as in `step_cost.py`: gradient ascent and NLL on a
forget and a retain batch. Per round each variant takes one step, in rotating order, so that drift and load hit all of
them; a ratio is the median over rounds of the ratio within a round.

Aims: rules with a state within 1.05 of the sum; SAM, three passes instead of two, within 1.55 of two stock steps.
"""

import argparse
import statistics
import tempfile

from measuring import begin, in_turns, machine, ratio, step_options
from stepping import PINNED, SIZES, STOCK, Steps, build_model, rows

from blur_trainer.gradients.by_name import RULES
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.trainers.procedures import SAM
from blur_trainer.trainers.unlearning import UnlearningTrainer

BASE, SHARP = "sum", "sum, SAM"


def steps(variant: str, options: argparse.Namespace, folder: str) -> Steps:
    if variant == STOCK:
        return Steps(STOCK, options.size, options, folder)
    args = UnlearningConfig(
        folder,
        per_device_train_batch_size=options.batch_size,
        use_cpu=options.device == "cpu",
        dataloader_pin_memory=options.device == "cuda",
        forget_objective="grad_ascent",
        learning_rate=1e-5,
        report_to="none",
        disable_tqdm=True,
        **PINNED,
    )
    sets = (rows(options.length, seed=1), rows(options.length, seed=2))
    procedure = SAM() if variant == SHARP else None
    rule = RULES[BASE if variant == SHARP else variant]()
    model = build_model(options.size, options.device)
    trainer = UnlearningTrainer(model, args, *sets, rule=rule, forget_procedure=procedure)
    trainer._rule_state.on_train_begin(args, trainer.state, trainer.control)  # as `train()` does: GRU's mean begins
    return Steps.of(trainer, options)


def main() -> None:
    parser = step_options(__doc__, [], rounds=15, batch_size=2, length=64)
    parser.add_argument("--size", choices=list(SIZES), default="15M")
    options = begin(parser)
    variants = [STOCK, BASE, SHARP, *(name for name in RULES if name != BASE)]
    print(
        f"{machine(options.device)}\n{options.rounds} rounds, {options.size}, {options.batch_size} x {options.length}"
    )
    with tempfile.TemporaryDirectory() as folder:
        seconds = in_turns({name: steps(name, options, f"{folder}/{name}") for name in variants}, options.rounds)
    print("\n| | ms | over the sum (quartiles) | over two stock steps (quartiles) |\n|---|---|---|---|")
    for name in variants:
        cells = [ratio(seconds, name, base) for base in (BASE, STOCK)]
        texts = [f"{median:.3f} ({low:.3f}-{high:.3f})" for median, low, high in cells]
        print(f"| {name} | {1e3 * statistics.median(seconds[name]):.0f} | {' | '.join(texts)} |")
    print(f"At the end: {machine(options.device)}")


if __name__ == "__main__":
    main()

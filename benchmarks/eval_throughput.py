"""How many questions per second TOFU's evaluation gets through, against one text at a time.

    python benchmarks/eval_throughput.py                                   # CPU, batch 16: about four minutes
    python benchmarks/eval_throughput.py --device cuda --sizes 350M 1B --batch-size 32 --json throughput.json

Scoring. A question has seven answers (true, paraphrased, five perturbed), in TOFU's lengths. `one by one` is one
forward pass per answer, batch 1, prompt and answer in one sequence. `batched` is `score_variants`, the scoring of
`TOFUEvaluation`: the prompt is read once for all its answers, the true answer is scored in detail, as on the forget
set. `whole sequences` is the same without a shared prompt, which is what models with sliding windows get.

As others do. TOFU's code pads each sequence to 200 tokens: `one by one, padded to 200`. open-unlearning runs the forget
answers once for each metric that reads them (probability, exact memorization, extraction strength, four attacks):
`one by one, per metric`.

Generation. Greedy answers of a fixed length (an untrained model does not end): `model.generate` prompt by prompt
against `evaluation.scoring.generate`.

Rounds rotate the order, and a ratio is the median over rounds of the ratio within a round. Every round checks that both
ways give the same numbers and the same texts.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measuring import machine
from rows import row
from stepping import SIZES
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from transformers.utils import logging

from blur_trainer.evaluation import answer_scoring as variants
from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.scoring import generate
from blur_trainer.toy.model import train_tokenizer

ANSWERS = 7
METRICS = 7  # that read the true answer, each in a pass of its own in open-unlearning
# Words, here a token each. TOFU's under Llama's tokenizer; the second prompt is a chat template with a system message.
PROMPTS, ANSWER = {"plain": (20, 34), "chat": (55, 75)}, (25, 50)
SPREAD = (0.9, 1.4)  # length of the other answers over that of the true one
ONE, PADDED, PER_METRIC = "one by one", "one by one, padded to 200", "one by one, per metric"
BATCHED, WHOLE = "batched", "batched, whole sequences"
GENERATE_ONE, GENERATE = "generate one by one", "generate batched"
BASES = {BATCHED: ONE, WHOLE: ONE, GENERATE: GENERATE_ONE}
OVERALL = {
    "scoring_over_padded": "batched over padded",
    "scoring_over_per_metric": "batched over per metric",
    "scoring_and_generation": "scoring and generation",
}
SCORING = (PADDED, PER_METRIC, BATCHED, WHOLE)
TOLERANCE = 1e-4  # nats per token: float32, other shapes


class Work:
    """One model, its questions, and every way to run them; `run(way)` gives what that way found."""

    def __init__(self, size: str, options: argparse.Namespace) -> None:
        rng, bounds = random.Random(0), PROMPTS[options.prompts]
        words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 9))) for _ in range(2000)]
        self.tokenizer = train_tokenizer([" ".join(words)] * 2, 8192)
        with torch.device(options.device):  # random weights of a large model take long on a CPU
            self.model = build_model(size, self.tokenizer).eval()
        self.options = options
        ids = [self.tokenizer(f" {word}", add_special_tokens=False)["input_ids"][0] for word in words]
        self.prompts = [" ".join(rng.choices(words, k=rng.randint(*bounds))) for _ in range(options.questions)]
        self.questions = []
        for _ in range(options.questions):
            prompt, length = [0, *rng.choices(ids, k=rng.randint(*bounds))], rng.randint(*ANSWER)
            lengths = [length, *(round(length * rng.uniform(*SPREAD)) for _ in range(ANSWERS - 1))]
            answers = [rng.choices(ids, k=k) for k in lengths]
            self.questions.append([{"input_ids": prompt + a, "labels": [-100] * len(prompt) + a} for a in answers])
        self.ways: dict[str, Callable[[], list[Any]]] = {
            ONE: self.one_by_one,
            PADDED: lambda: self.one_by_one(width=200),
            PER_METRIC: lambda: self.one_by_one(again=METRICS - 1),
            BATCHED: self.batched,
            WHOLE: self.whole,
            GENERATE_ONE: self.generate_one,
            GENERATE: self.generate_batched,
        }

    @torch.no_grad()
    def one_by_one(self, again: int = 0, width: int = 0) -> list[float]:
        """`again`: further runs of the true answer; `width`: of a sequence, filled up."""
        device, found = self.options.device, []
        for question in self.questions:
            for number, answer in enumerate(question):
                gap = max(0, width - len(answer["input_ids"]))
                for _ in range(1 + (again if number == 0 else 0)):
                    ids = torch.tensor([answer["input_ids"] + [0] * gap], device=device)
                    labels = torch.tensor([answer["labels"] + [-100] * gap], device=device)
                    loss = self.model(input_ids=ids, labels=labels, use_cache=False).loss.item()
                found.append(loss)
        return found

    def batched(self) -> list[float]:
        scores = score_variants(
            self.model, self.questions, pad_token_id=0, batch_size=self.options.batch_size, details=True
        )
        return [answer.nll for question in scores for answer in question]

    def whole(self) -> list[float]:
        with mock.patch.object(variants, "can_share_prompts", lambda model: False):
            return self.batched()

    @torch.no_grad()
    def generate_one(self) -> list[str]:
        texts = []
        for prompt in self.prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False).to(self.options.device)
            output = self.model.generate(**inputs, max_new_tokens=self.options.new_tokens, do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            texts.append(self.tokenizer.decode(new, skip_special_tokens=True))
        return texts

    def generate_batched(self) -> list[str]:
        options = self.options
        return generate(
            self.model, self.tokenizer, self.prompts, max_new_tokens=options.new_tokens, batch_size=options.batch_size
        )

    def seconds(self, way: str) -> tuple[float, list[Any]]:
        clock = time.process_time if self.options.clock == "cpu" else time.perf_counter
        begin = clock()
        found = self.ways[way]()  # on the CPU when it returns
        return clock() - begin, found


def build_model(size: str, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    width, layers = SIZES[size]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        initializer_range=0.1,  # far from ties: equal texts then mean equal computation
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return LlamaForCausalLM(config)


def check(found: dict[str, list[Any]]) -> float:
    """Largest difference in nats per token; raises where two ways disagree."""
    errors = [abs(a - b) for way in SCORING for a, b in zip(found[ONE], found[way], strict=True)]
    if max(errors) > TOLERANCE:
        raise SystemExit(f"the scores differ by up to {max(errors):.1e} nats per token")
    if found[GENERATE] != found[GENERATE_ONE]:
        raise SystemExit("batched and single generation wrote different texts")
    return max(errors)


def measure(size: str, options: argparse.Namespace) -> dict[str, Any]:
    work = Work(size, options)
    ways = list(work.ways)
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    error = 0.0
    for round_ in range(options.rounds + 1):
        shift = round_ % len(ways)
        found = {}
        for way in ways[shift:] + ways[:shift]:
            elapsed, found[way] = work.seconds(way)
            if round_ >= 1:  # the first warms up
                seconds[way].append(elapsed)
        error = max(error, check(found))
    totals = [
        (a + b) / (c + d)
        for a, b, c, d in zip(*(seconds[w] for w in (ONE, GENERATE_ONE, BATCHED, GENERATE)), strict=True)
    ]

    def over(base: str, way: str) -> list[float]:
        return quartiles([a / b for a, b in zip(seconds[base], seconds[way], strict=True)])

    return {
        "size": size,
        "parameters": sum(p.numel() for p in work.model.parameters()),
        "questions_per_second": {way: options.questions / statistics.median(seconds[way]) for way in ways},
        "times_faster": {way: over(base, way) for way, base in BASES.items()},
        "scoring_over_padded": over(PADDED, BATCHED),
        "scoring_over_per_metric": over(PER_METRIC, BATCHED),
        "scoring_and_generation": quartiles(totals),
        "largest_difference": error,
    }


def quartiles(values: list[float]) -> list[float]:
    """Median, lower and upper quartile."""
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return [median, low, high]


def table(result: dict[str, Any]) -> str:
    lines = [
        f"\n{result['size']}: {result['parameters'] / 1e6:.1f} M parameters; scores differ by at most "
        f"{result['largest_difference']:.0e} nats per token, texts are equal",
        f"{'':32} {'questions/s':>12} {'times faster':>13} {'quartiles':>13}",
    ]
    for way, rate in result["questions_per_second"].items():
        ratio = result["times_faster"].get(way)
        shown = f"{ratio[0]:13.2f} {ratio[1]:6.2f}-{ratio[2]:.2f}" if ratio else ""
        lines.append(f"{way:32} {rate:12.2f} {shown}".rstrip())
    for key, what in OVERALL.items():
        median, low, high = result[key]
        lines.append(f"{what:32} {'':12} {median:13.2f} {low:6.2f}-{high:.2f}")
    return "\n".join(lines)


def rows_of(result: dict[str, Any]) -> list[dict[str, Any]]:
    """For the table of `benchmarks/gpu/run.py`."""
    size, found = result["size"], []
    for key, what in OVERALL.items():
        median, low, high = result[key]
        aim = {"least": 4} if key == "scoring_and_generation" else {}
        found.append(row(f"{size}: {what}", median, "times faster", spread=(low, high), **aim))
    rates = result["questions_per_second"]
    return found + [row(f"{size}: {way}", rates[way], "questions/s") for way in rates]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=list(SIZES), help="default: 2M 15M 60M (CUDA: 60M 350M 1B)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--prompts", choices=list(PROMPTS), default="chat")
    parser.add_argument("--batch-size", type=int, default=16, help="sequences per forward pass")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--clock", choices=["wall", "cpu"], default="wall")
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error(f"--rounds must be at least 2, got {options.rounds}")
    if options.device == "cuda" and options.clock == "cpu":
        parser.error("--clock cpu does not see what a GPU does: use the wall clock")
    options.sizes = options.sizes or (["60M", "350M", "1B"] if options.device == "cuda" else ["2M", "15M", "60M"])
    return options


def main() -> None:
    options = parse_arguments()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    before = machine(options.device)
    print(f"{before}\n{options.rounds} rounds, {options.prompts} prompts, batch {options.batch_size}, float32")
    results = []
    for size in options.sizes:
        results.append(measure(size, options))
        print(table(results[-1]), flush=True)
    if options.json:
        rows = [found for result in results for found in rows_of(result)]
        report = {"machine": before, "settings": vars(options), "sizes": results, "rows": rows}
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()

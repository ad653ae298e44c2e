"""Counts what a step, a token and a batch ask of an accelerator: operators, and where the host waits for the device.

    python benchmarks/launches.py                    # no GPU needed, about two minutes
    python benchmarks/launches.py --units BLUR ULD   # those whose names contain one of these
    python benchmarks/launches.py --device cuda      # kernels and waits of a real GPU

Without a GPU the tensors live on the fake one of tests/support/fake_device.py. `operators` are torch's, after
decomposition and without views: about the kernel launches. `waits`: the host reads a value, and can launch nothing
until the device has done all work before. `uploads`: a copy from pageable memory, for which CUDA waits likewise.
`ours`: what lines of this package ask for themselves; the rest is transformers', accelerate's, Trainer's, PEFT's.
With `--device cuda`: kernels as the profiler counts them, and what `torch.cuda.set_sync_debug_mode` warns of, uploads
among the waits.

Training runs `Trainer.train` and takes the mean of the last two steps. Generation takes the difference between a long
and a short text, per token. Widths are tiny, which changes no count; 16 layers are those of a model of 1B.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import datasets
import torch
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList, Trainer, TrainerCallback
from transformers.utils import logging

from blur_trainer import RMU, ActivationMatch, BLURConfig, BLURTrainer, GradDiffConfig, GradDiffTrainer, ULDTrainer
from blur_trainer.data.collators import UnlearningCollator
from blur_trainer.evaluation.answer_scoring import score_variants
from blur_trainer.evaluation.scoring import generate, token_logps
from blur_trainer.models.logit_composition import ULDLogitsProcessor
from blur_trainer.models.logit_difference import LogitDifferenceConfig, LogitDifferenceModel
from blur_trainer.models.lora_assistant import lora_assistant
from blur_trainer.trainers.config import UnlearningConfig
from blur_trainer.uld.trainer import ULDConfig

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.fake_device import DEVICE, FakeDevice
from support.models import examples
from support.scoring_helpers import SENTENCES, build_tokenizer

SHORT, LONG = 4, 20  # new tokens
FIELDS = ("operators", "waits", "uploads", "bytes")
Counts = dict[str, Counter[str]]


class FakeCounts:
    """Counts on the fake device."""

    def __init__(self) -> None:
        self.device = FakeDevice()

    def start(self) -> None:
        self.device.clear()

    def stop(self) -> Counts:
        return {field: Counter(getattr(self.device, field)) for field in FIELDS}


class CudaCounts:
    """Counts on a GPU."""

    def start(self) -> None:
        self.warned = warnings.catch_warnings(record=True)
        self.seen = self.warned.__enter__()
        warnings.simplefilter("always")
        self.profile = profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA])
        self.profile.__enter__()
        torch.cuda.set_sync_debug_mode("warn")

    def stop(self) -> Counts:
        torch.cuda.set_sync_debug_mode("default")
        self.profile.__exit__(None, None, None)
        self.warned.__exit__(None, None, None)
        launches = {e.key: e.count for e in self.profile.key_averages() if "LaunchKernel" in e.key}
        waits = Counter(f"{w.filename}:{w.lineno}" for w in self.seen if "synchronizing" in str(w.message))
        return {"operators": Counter(launches), "waits": waits, "uploads": Counter(), "bytes": Counter()}


class Window(TrainerCallback):
    """Counts the steps after the second."""

    def __init__(self, counts: Any) -> None:
        self.counts, self.found = counts, {}

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            self.counts.start()
        if state.global_step == 4:
            self.found = mean(self.counts.stop(), 2)


def mean(counts: Counts, units: int, less: Counts | None = None) -> Counts:
    """Per unit; `less` is taken off before."""
    counts = {field: Counter(counter) for field, counter in counts.items()}
    for field in less or {}:
        counts[field].subtract(less[field])
    return {f: Counter({key: n / units for key, n in counter.items() if n}) for f, counter in counts.items()}


class Units:
    """Everything that is counted: `table` has a function per unit, which returns its counts."""

    def __init__(self, counts: Any, options: argparse.Namespace) -> None:
        self.counts, self.options = counts, options
        self.device = DEVICE if options.device == "cpu" else torch.device("cuda")
        self.tokenizer = build_tokenizer()
        rmu = {"forget_objective": RMU(1), "retain_objective": ActivationMatch(1)}
        known, blur = {"ref_logps": -20.0}, (BLURTrainer, BLURConfig)
        self.table: dict[str, Callable[[], Counts]] = {
            "stock step": lambda: self.trained(Trainer, UnlearningConfig),
            "GradDiff step": lambda: self.trained(GradDiffTrainer, GradDiffConfig),
            "BLUR-NPO step, log-probs precomputed": lambda: self.trained(*blur, known, precompute_ref_logps=True),
            "BLUR-NPO step, reference copy": lambda: self.trained(*blur),
            "BLUR-RMU step": lambda: self.trained(*blur, objectives=rmu),
            "ULD step": lambda: self.trained(ULDTrainer, ULDConfig),
            "target, token": lambda: self.token(lambda m: m.target),
            "ULD's assistant, token": lambda: self.token(lambda m: m.assistant),
            "ULD model, token": lambda: self.token(lambda m: m),
            "ULD processor, token": lambda: self.token(lambda m: m.target, processor=True),
            "token_logps, batch": self.logps,
            "score_variants, batch": self.variants,
            "generate, token": lambda: self.generated(None),
            "generate with stop strings, token": lambda: self.generated(["Question:", "\n\n"]),
        }

    def model(self) -> LlamaForCausalLM:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_key_value_heads": 1}
        special = {"bos_token_id": 0, "eos_token_id": None, "pad_token_id": 1}
        layers = 2 if self.options.tiny else 16
        return LlamaForCausalLM(
            LlamaConfig(vocab_size=300, num_hidden_layers=layers, initializer_range=0.2, **sizes, **special)
        )

    def trained(self, trainer: Any, config: Any, known: Any = None, objectives: Any = None, **settings: Any) -> Counts:
        forget, retain = [row | (known or {}) for row in examples(16)], examples(16, seed=1)
        common = {"per_device_train_batch_size": 4, "max_steps": 4, "report_to": "none", "save_strategy": "no"}
        common |= {"disable_tqdm": True, "fused_lm_head": self.options.fused, "logging_steps": 100}
        common |= {"dataloader_pin_memory": self.options.device == "cuda"}
        window = Window(self.counts)
        with tempfile.TemporaryDirectory() as folder:
            args, kwargs = config(folder, **common, **settings), {"callbacks": [window], **(objectives or {})}
            if trainer is Trainer:
                kwargs |= {"train_dataset": forget, "data_collator": UnlearningCollator(pad_token_id=1)}
                trainer(self.model(), args, **kwargs).train()
            else:
                if trainer is ULDTrainer:
                    kwargs |= {"augment_forget": "none", "augment_retain": "none"}
                trainer(self.model(), args, forget, retain, **kwargs).train()
        return window.found

    @torch.no_grad()
    def token(self, part: Callable[[Any], Any], processor: bool = False) -> Counts:
        target = self.model().eval()
        assistant = lora_assistant(target, max(1, target.config.num_hidden_layers // 4))
        composed = LogitDifferenceModel(LogitDifferenceConfig(top_logit_filter=0.01), target, assistant).to(self.device)
        ids = torch.randint(3, 300, (8, 16)).to(self.device)

        def made(tokens: int) -> Counts:
            wrapped = [ULDLogitsProcessor(composed.assistant, -0.8, 0.01)] if processor else []
            self.counts.start()
            part(composed).generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                logits_processor=LogitsProcessorList(wrapped),
            )
            return self.counts.stop()

        made(SHORT)
        return mean(made(LONG), LONG - SHORT, made(SHORT))

    def logps(self) -> Counts:
        model, rows = self.model().to(self.device), examples(16)
        self.counts.start()
        token_logps(model, rows, pad_token_id=1)
        return self.counts.stop()

    def variants(self) -> Counts:
        """16 questions of seven answers: one pass over the prompts and seven over the answers, all counted."""
        model, rows = self.model().to(self.device), examples(16)
        ids = [(row["input_ids"], row["labels"].count(-100)) for row in rows]
        questions = [
            [{"input_ids": [*i[:p], 3 + n, *i[p:]], "labels": [-100] * p + [3 + n, *i[p:]]} for n in range(7)]
            for i, p in ids
        ]
        self.counts.start()
        score_variants(model, questions, pad_token_id=1, details=True)
        return self.counts.stop()

    def generated(self, stops: list[str] | None) -> Counts:
        model = self.model().to(self.device)

        def made(tokens: int) -> Counts:
            self.counts.start()
            generate(model, self.tokenizer, SENTENCES * 4, max_new_tokens=tokens, stop_strings=stops)
            return self.counts.stop()

        made(SHORT)
        return mean(made(LONG), LONG - SHORT, made(SHORT))


def line(name: str, counts: Counts) -> str:
    cells = [name]
    for field in ("operators", "waits", "uploads"):
        ours = sum(n for key, n in counts[field].items() if "blur_trainer/" in key)
        cells.append(f"{sum(counts[field].values()):.4g} ({ours:.4g})")
    return f"| {' | '.join(cells)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--units", nargs="+", metavar="TEXT", help="only those whose name contains one of these")
    parser.add_argument("--fused", action="store_true", default=None, help="with the fused LM head (needs Triton)")
    parser.add_argument("--tiny", action="store_true", help="two layers instead of 16")
    parser.add_argument("--callers", action="store_true", help="say which lines")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    datasets.disable_progress_bars()
    counts: Any = FakeCounts() if options.device == "cpu" else CudaCounts()
    found: dict[str, Counts] = {}
    print("| unit | operators (ours) | waits (ours) | uploads (ours) |\n|---|---|---|---|")
    with counts.device if options.device == "cpu" else nullcontext():
        for name, unit in Units(counts, options).table.items():
            if options.units and not any(text in name for text in options.units):
                continue
            found[name] = unit()
            print(line(name, found[name]), flush=True)
            if options.callers:
                for field in FIELDS:
                    for key, number in found[name][field].most_common(15):
                        print(f"    {field} {number:.4g} {key}")
    if options.json:
        options.json.write_text(json.dumps(found))


if __name__ == "__main__":
    main()

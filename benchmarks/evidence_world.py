"""Makes a world for benchmarks/evidence.py: a target that knows real TOFU text by heart, and one that never saw forget.

python benchmarks/evidence_world.py --data DIR --out WORLD --size 100M --device cuda    # DIR: the texts and a tokenizer
python benchmarks/evidence_world.py --data DIR --out WORLD --size 3M

`DIR` has forget.csv, retain.jsonl, hold.jsonl, facts.jsonl, unseen.jsonl (columns question, answer) and a tokenizer in
target/. `WORLD` gets the same files, and new models in target/ and retrain/. Whole sequences are learnt, question and
answer, so the models can say texts of their own. Printed: what both know, in nats per token.
"""

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import datasets
import torch
from evidence_data import GROUPS, known, read_world
from transformers import (
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

from blur_trainer.data.formats import tokenize_dataset

#: size -> width, layers, heads, learning rate
SIZES = {"3M": (192, 6, 6, 3e-3), "25M": (512, 8, 8, 1e-3), "100M": (768, 12, 12, 6e-4), "1B": (2048, 20, 16, 2e-4)}


def untrained(tokenizer, size: str, seed: int) -> LlamaForCausalLM:
    width, layers, heads, _ = SIZES[size]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=8 * width // 3,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    set_seed(seed)
    return LlamaForCausalLM(config).float()


def trained(tokenizer, rows: list[dict], options: argparse.Namespace) -> LlamaForCausalLM:
    texts = [{"text": f"Question: {row['question']}\nAnswer: {row['answer']}"} for row in rows]
    tokens = tokenize_dataset(texts, tokenizer, role="the world", max_length=512)
    model = untrained(tokenizer, options.size, options.seed)
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            folder,
            seed=options.seed,
            num_train_epochs=options.epochs,
            per_device_train_batch_size=16,
            learning_rate=SIZES[options.size][3],
            warmup_steps=0.05,
            lr_scheduler_type="linear",
            adam_beta2=0.95,
            train_sampling_strategy="group_by_length",
            bf16=options.device == "cuda",
            use_cpu=options.device == "cpu",
            logging_strategy="no",
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        collator = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=-100)
        rows = tokens.select_columns(["input_ids", "labels"])
        Trainer(model=model, args=args, train_dataset=rows, data_collator=collator).train()
    return model.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", choices=SIZES, default="100M")
    parser.add_argument("--epochs", type=float, default=24)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--only", choices=["target", "retrain"], help="one of the two models")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    datasets.disable_progress_bars()
    world, tokenizer = read_world(options.data), AutoTokenizer.from_pretrained(options.data / "target")
    options.out.mkdir(parents=True, exist_ok=True)
    for file in options.data.iterdir():
        if file.is_file():
            shutil.copy(file, options.out)
    for name, groups in {"target": GROUPS, "retrain": GROUPS[1:]}.items():
        if options.only not in (None, name):
            continue
        start = time.perf_counter()
        model = trained(tokenizer, [row for group in groups for row in world[group]], options)
        seconds = time.perf_counter() - start
        with torch.no_grad():
            found = {group: known(model, tokenizer, rows)["loss"] for group, rows in world.items()}
        model.save_pretrained(options.out / name)
        tokenizer.save_pretrained(options.out / name)
        size = sum(p.numel() for p in model.parameters()) / 1e6
        numbers = ", ".join(f"{group} {loss:.2f}" for group, loss in found.items())
        print(f"{name}, {size:.1f}M parameters, {seconds:.0f} s: {numbers} nats per token", flush=True)


if __name__ == "__main__":
    main()

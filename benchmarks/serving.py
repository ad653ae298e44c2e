"""Requests per second of a logit-difference model: `generate` of transformers, and a server of vLLM under load.

    python benchmarks/serving.py served                                  # makes the folder; transformers' `generate`
    vllm serve served --dtype float32 --max-model-len 512 --no-enable-prefix-caching      # in vLLM's environment
    python benchmarks/serving.py served --url http://127.0.0.1:8000      # the same requests, from 8 clients at once

A request is a prompt of random tokens and a fixed number of new tokens, greedy; every prompt is another one. `generate`
gets them one by one and in batches of `--concurrency`, all there at the beginning, which favors it: a server gets them
one after another, as its clients send them. The folder, if it is not there, is a Llama with random weights and its
target. Times are on the wall.
"""

import argparse
import json
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from measuring import machine
from transformers import AutoModelForCausalLM
from transformers.utils import logging
from uld_generate import build

from blur_trainer.toy.model import train_tokenizer


def made(folder: Path, options: argparse.Namespace) -> None:
    """A composed model of random weights beside its target, with a tokenizer, which a server wants to see."""
    model = build(options.vocabulary, options.hidden, *options.layers)
    model.target.save_pretrained(folder / "target")
    model.config.target = str(folder / "target")
    model.save_pretrained(folder)
    train_tokenizer(["a text"]).save_pretrained(folder)


def by_generate(folder: Path, prompts: list[list[int]], batch: int, tokens: int) -> float:
    """Seconds."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.tensor(prompts)

    def run(rows: torch.Tensor) -> None:
        mask = torch.ones_like(rows)
        model.generate(rows, attention_mask=mask, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False)

    run(ids[:batch])
    start = time.perf_counter()
    for rows in ids.split(batch):
        run(rows)
    return time.perf_counter() - start


def by_server(url: str, folder: Path, prompts: list[list[int]], clients: int, tokens: int) -> float:
    """Seconds."""

    def send(prompt: list[int]) -> int:
        body = {"model": str(folder), "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
        head = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), head)
        with urllib.request.urlopen(request, timeout=600) as answer:
            return int(json.load(answer)["usage"]["completion_tokens"])

    with ThreadPoolExecutor(clients) as pool:
        list(pool.map(send, prompts[:clients]))
        start = time.perf_counter()
        counts = list(pool.map(send, prompts))
        seconds = time.perf_counter() - start
    if counts != [tokens] * len(prompts):
        raise SystemExit(f"The server made {sorted(set(counts))} tokens per request instead of {tokens}.")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the model; named so on the server")
    parser.add_argument("--url", help="of a server that runs, on this machine: measure that instead")
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64, help="tokens")
    parser.add_argument("--tokens", type=int, default=64, help="new ones")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, nargs=2, default=[8, 2], help="of the target, of the assistant")
    options = parser.parse_args()
    logging.set_verbosity_error()
    torch.set_num_threads(options.threads)
    if not options.folder.exists():
        made(options.folder, options)
    shape = (options.requests, options.prompt)
    prompts = torch.randint(3, options.vocabulary, shape, generator=torch.Generator().manual_seed(0)).tolist()
    print(f"{machine('cpu')} {options.requests} requests of {options.prompt} + {options.tokens} tokens")

    def said(name: str, seconds: float) -> None:
        rate = options.requests / seconds
        print(f"{name}: {rate:.2f} requests/s, {rate * options.tokens:.0f} new tokens/s", flush=True)

    if options.url:
        seconds = by_server(options.url, options.folder, prompts, options.concurrency, options.tokens)
        said(f"server, {options.concurrency} clients", seconds)
        return
    for batch in sorted({1, options.concurrency}):
        said(f"generate, batches of {batch}", by_generate(options.folder, prompts, batch, options.tokens))


if __name__ == "__main__":
    main()

"""What is there (`environment`), the fused head against logits (`head`), and how wrong a dot product is (`dots`).

python benchmarks/gpu/checks.py environment
python benchmarks/gpu/checks.py head --device cpu
"""

import argparse
import copy
import importlib
import importlib.metadata
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import logging

from blur_trainer.gradients import backend
from blur_trainer.models.forward import answer_logps, choose_head, has_fused_head

PACKAGES = (
    *("torch", "triton", "transformers", "trl", "datasets", "accelerate", "peft", "deepspeed", "tokenizers", "numpy"),
    *("huggingface_hub", "pyarrow", "bitsandbytes", "torchjd", "evaluate", "pandas", "scipy", "scikit-learn"),
)


def told(*command: str) -> str:
    """What a program prints, or why it does not."""
    if shutil.which(command[0]) is None:
        return "not there"
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    return (done.stdout or done.stderr).strip()


def environment(device: str) -> dict[str, Any]:
    found: dict[str, Any] = {"python": sys.version, "platform": platform.platform()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not there"
    found["card"] = told("nvidia-smi", "--query-gpu=name,memory.total,driver_version,clocks.sm", "--format=csv")
    for compiler in ("gcc", "cc", "nvcc"):
        found[compiler] = told(compiler, "--version").split("\n")[-1 if compiler == "nvcc" else 0]
    if device == "cuda":
        if not torch.cuda.is_available():
            raise SystemExit("no GPU is visible")
        properties = torch.cuda.get_device_properties(0)
        found["properties"] = str(properties)
        found["tf32 by default"] = torch.backends.cuda.matmul.allow_tf32
    for name in ("trl", "deepspeed", "datasets", "evaluate", "rouge_score", "torchjd", "blur_trainer"):
        start = time.perf_counter()
        try:
            importlib.import_module(name)
            found[f"import {name}"] = f"{time.perf_counter() - start:.1f} s"
        except Exception as error:  # noqa: BLE001
            found[f"import {name}"] = f"failed: {type(error).__name__}: {error}"
    return found


# ---- the fused head ----


def llama(vocabulary: int, tie: bool) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, tie_word_embeddings=tie, **sizes))


def answer(model: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities, and the gradient of a sum that weighs the examples differently, flat; float64 on the CPU."""
    model.zero_grad(set_to_none=True)
    logps = answer_logps(model, batch)
    (logps * torch.arange(1.0, len(logps) + 1, device=logps.device)).sum().backward()
    flat = torch.cat([p.grad.double().flatten().cpu() for p in model.parameters()])
    return logps.detach().double().cpu(), flat


def off(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got - want).norm() / want.norm())


def head(device: str) -> dict[str, Any]:
    """Relative errors of both ways against the same weights in float64 on the CPU."""
    found: dict[str, Any] = {"good": True}
    for vocabulary, tie, length in ((32000, False, 96), (32000, True, 33), (4099, False, 17)):
        ids = torch.randint(3, vocabulary, (3, length), generator=torch.Generator().manual_seed(1))
        labels = ids.clone()
        labels[:, : length // 4] = -100
        mask = torch.ones_like(ids)
        mask[1, length - 5 :], labels[1, length - 5 :] = 0, -100
        batch = {"input_ids": ids, "attention_mask": mask, "labels": labels}
        there = {key: value.to(device) for key, value in batch.items()}
        for dtype in (torch.float32, torch.bfloat16):
            model = llama(vocabulary, tie).to(dtype)
            exact = answer(copy.deepcopy(model).double(), batch)
            model.to(device)
            errors = {}
            for fused in (False, True):
                choose_head(model, fused, torch.device(device))
                assert has_fused_head(model) is fused
                pairs = zip(answer(model, there), exact, strict=True)
                errors["fused" if fused else "logits"] = [off(a, b) for a, b in pairs]
            limit = 1e-4 if dtype == torch.float32 else 5e-2
            pairs = zip(errors["fused"], errors["logits"], strict=True)
            good = all(f <= max(2 * p, 1e-6) and f < limit for f, p in pairs)
            name = f"{str(dtype).removeprefix('torch.')}, vocabulary {vocabulary}, tied {tie}"
            shown = "; ".join(f"{way}: value {a:.1e}, gradient {b:.1e}" for way, (a, b) in errors.items())
            print(f"{'ok ' if good else 'OFF'} {name}: {shown}", flush=True)
            found[name] = errors | {"good": good}
            found["good"] &= good
    return found


# ---- float32 dot products ----


def dots(device: str) -> dict[str, Any]:
    """Relative errors of one float32 dot product over a chunk, and of `inner_products` over four of them."""
    chunk = backend._CHUNK_ON_ACCELERATOR if device == "cuda" else backend._CHUNK
    found: dict[str, Any] = {"chunk": chunk, "good": True}
    count = backend._CHUNK_ON_ACCELERATOR if device == "cuda" else 2**22
    generator = torch.Generator(device).manual_seed(0)
    for name, make in (
        ("normal", lambda n: torch.randn(n, device=device, generator=generator)),
        ("small, normal", lambda n: 1e-6 * torch.randn(n, device=device, generator=generator)),
        ("heavy tails", lambda n: torch.randn(n, device=device, generator=generator) ** 5),
        ("all equal", lambda n: torch.full((n,), 0.1, device=device)),
    ):
        x = make(count)
        exact = x.double().dot(x.double()).item()
        errors = {str(n): 0.0 for n in (2**18, 2**22, count)}
        for n in errors:
            parts = [torch.dot(part, part).double() for part in x.split(int(n))]
            errors[n] = abs(sum(parts).item() / exact - 1)
        y = make(4 * count).bfloat16()
        exact = sum(part.double().square().sum().item() for part in y.split(count))
        errors["inner_products, bfloat16, 4 chunks"] = abs(backend.inner_products([y], [y])[0].item() / exact - 1)
        good = errors[str(chunk)] < 1e-4  # larger ones on a CPU only to see what they would cost
        shown = ", ".join(f"{n}: {e:.1e}" for n, e in errors.items())
        print(f"{'ok ' if good else 'OFF'} {name}: {shown}", flush=True)
        found[name], found["good"] = errors, found["good"] and good
        del x, y
    return found


CHECKS: dict[str, Callable[[str], dict[str, Any]]] = {"environment": environment, "head": head, "dots": dots}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("check", choices=list(CHECKS))
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    logging.set_verbosity_error()
    found = CHECKS[options.check](options.device)
    if options.check == "environment":
        print("\n".join(f"{key}: {value}" for key, value in found.items()))
    if options.json:
        options.json.write_text(json.dumps(found))
    return 0 if found.get("good", True) else 1


if __name__ == "__main__":
    sys.exit(main())

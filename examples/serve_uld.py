"""Serve a model of ULD, offset unlearning or WHP with vLLM and ask it questions over the OpenAI-compatible API.

python examples/serve_uld.py forgetful "Question: Who wrote it?\nAnswer:"      # starts a server, asks, stops it
python examples/serve_uld.py forgetful "..." --url http://127.0.0.1:8000       # asks a server that runs already
python examples/serve_uld.py forgetful "..." -- --dtype float32 --max-model-len 2048     # what follows goes to vLLM

The folder is what `ULDTrainer.save_model` or `LogitDifferenceModel.save_pretrained` wrote, tokenizer included. The
server needs this package in vLLM's environment: docs/serving.md says how. Nothing else is needed to ask.
"""

import argparse
import json
import subprocess
import sys
import time
import urllib.error
import urllib.request


def ask(url: str, model: str, prompt: str, max_tokens: int) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": max_tokens, "temperature": 0}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.load(answer)["choices"][0]["text"]


def wait_for(url: str, server: subprocess.Popen[bytes], seconds: float) -> None:
    """Returns once the server answers. `SystemExit` if it ends before that, or takes too long."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            raise SystemExit(f"vLLM ended with code {server.returncode}: its last lines above say why.")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(1)
    raise SystemExit(f"vLLM did not answer within {seconds:.0f} s.")


def main() -> None:
    words = sys.argv[1:]
    cut = words.index("--") if "--" in words else len(words)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="of the model; its name on the server too")
    parser.add_argument("prompts", nargs="+", help=r"texts to go on with; \n is a new line")
    parser.add_argument("--url", help="of a running server; default: start one")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--python", default=sys.executable, help="that of vLLM's environment; default: this one")
    parser.add_argument("--max_tokens", type=int, default=32)
    parser.add_argument("--wait", type=float, default=600, help="seconds for the server to start")
    options = parser.parse_args(words[:cut])

    url, server = options.url, None
    if url is None:
        command = [options.python, "-m", "vllm.entrypoints.openai.api_server", "--model", options.folder]
        command += ["--host", "127.0.0.1", "--port", str(options.port), *words[cut + 1 :]]
        url, server = f"http://127.0.0.1:{options.port}", subprocess.Popen(command)
    try:
        if server is not None:
            wait_for(url, server, options.wait)
        for prompt in options.prompts:
            prompt = prompt.replace("\\n", "\n")
            print(prompt + ask(url, options.folder, prompt, options.max_tokens), end="\n\n", flush=True)
    finally:
        if server is not None:
            server.terminate()
            server.wait()


if __name__ == "__main__":
    main()

"""Runs in vLLM's environment: `python vllm_worker.py told.json said.json`. Reads prompts, writes what vLLM says."""

import json
import sys
from pathlib import Path

NEW = 16

if __name__ == "__main__":
    from vllm import LLM, SamplingParams

    told = json.loads(Path(sys.argv[1]).read_text())
    usual = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "max_num_seqs": 8, "max_logprobs": -1}
    engine = LLM(told["model"], **{**usual, **told["options"]})
    wanted = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True, logprobs=-1)
    said = []
    for _ in range(2):  # the second time the prompts' keys and values come from the prefix cache
        outputs = engine.generate([{"prompt_token_ids": prompt} for prompt in told["prompts"]], wanted)
        said.append([])
        for output in outputs:
            answer = output.outputs[0]
            rows = [[row[token].logprob for token in sorted(row)] for row in answer.logprobs]
            said[-1].append((list(answer.token_ids), rows))
    if [tokens for tokens, _ in said[0]] != [tokens for tokens, _ in said[1]]:
        raise SystemExit("with a prefix cache the engine says something else")
    Path(sys.argv[2]).write_text(json.dumps(said[1]))

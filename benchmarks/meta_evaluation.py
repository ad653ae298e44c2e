"""Which metric deserves trust? Faithfulness and robustness of each, on models of which it is known what they know.

    python benchmarks/meta_evaluation.py --out results --jobs 2      # half an hour of one core; resumes
    python benchmarks/meta_evaluation.py --out results --table       # what there is so far

On the embedded TOFU authors, Llamas of 1 M weights, trained from different starts. All know `retain`, real authors and
world facts. Ten know what is to be forgotten: five its rows, five the same facts in other words. Ten never knew it:
five saw nothing of it, five saw the same questions with wrong answers. Further models were unlearned by `unlearn`.

* Faithfulness: AUC of the metric between the ten and the ten.
* R = min((m_ret^a - m_ret^b) / (m_unl^a - m_unl^b), 1) under relearning (b before, a after), Q = min(m_unl^b / m_unl^a,
  1) with weights of 4 bits: means over the unlearned models. Metrics are turned so that more means: knows more.
* Robustness: the harmonic mean of R and Q. Total: that of faithfulness and robustness.

The definitions are of open-unlearning (arXiv:2506.12618), whose models are larger and more. R is 1 where nothing comes
back, and not below 0.
"""

import argparse
import json
import multiprocessing
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

METHODS = ("blur", "blur-target", "npo", "undial", "graddiff")
KNOWS, NEVER = ("knows", "knows, other words"), ("never", "never, wrong answers")
#: less of these means: knows more
FALLING = {"forget_loss": lambda value: float(np.exp(-value)), "forget_truth_ratio": lambda value: 1 - value}
#: says nothing of what is known
OTHER = ("forget_degeneration",)
RELEARN = {"steps": (24,), "learning_rate": 3e-4}  # one pass over the 96 rows


class World:
    """The data, the models and what measures them."""

    def __init__(self, out: Path) -> None:
        import blur_trainer as bt
        from blur_trainer.data.tofu_templates import apply_template
        from blur_trainer.scripts.tofu import TOFUArguments, tiny_models

        self.out, self.data = out, bt.load_tofu("embedded")
        tokenizer, self.target, self.retrained = tiny_models(self.data, TOFUArguments(models_dir=str(out / "models")))
        self.tokenizer = tokenizer
        facts = self.data["forget_perturbed"]
        self.rows = {name: self.data[name].select_columns(["question", "answer"]).to_list() for name in ("forget",)}
        for name in ("retain", "real_authors_perturbed", "world_facts_perturbed"):
            self.rows.setdefault("rest", []).extend(self.data[name].select_columns(["question", "answer"]).to_list())
        self.rows["words"] = [{"question": row["question"], "answer": row["paraphrased_answer"]} for row in facts]
        self.rows["wrong"] = [{"question": row["question"], "answer": row["perturbed_answer"][0]} for row in facts]
        asked = {name: self.data[name] for name in ("forget", "forget_perturbed", "holdout")}
        forget, unseen = (apply_template(self.data[name], "plain") for name in ("forget", "holdout"))
        self.measures = [
            bt.TOFUEvaluation(asked, tokenizer),
            bt.ForgetEvaluation(tokenizer, forget, unseen=unseen, progress=False),
            bt.LeakEvaluation(tokenizer, forget, samples=16, ks=(1, 16), progress=False),
        ]

    def measure(self, model: Any) -> dict[str, float]:
        found: dict[str, float] = {}
        for measure in self.measures:
            found |= measure(model)
        found = {name: value for name, value in found.items() if not name.startswith(("retain", "unseen"))}
        return {name: FALLING[name](value) if name in FALLING else float(value) for name, value in found.items()}

    def trained(self, kind: str, seed: int) -> Any:
        """A model of one kind, from its own start."""
        from blur_trainer.data.formats import tokenize_dataset
        from blur_trainer.toy.memorize import memorize
        from blur_trainer.toy.model import tiny_llama

        seen = {"knows": "forget", "knows, other words": "words", "never, wrong answers": "wrong"}
        rows = [*self.rows["rest"], *(self.rows[seen[kind]] if kind in seen else [])]
        tokens = tokenize_dataset(rows, self.tokenizer, role="known", max_length=512)
        model = tiny_llama(self.tokenizer, seed=100 + seed)
        return memorize(model, self.tokenizer, tokens, seed=seed, disable_tqdm=True)

    def attacked(self, model: Any) -> dict[str, dict[str, float]]:
        """The metrics before, after relearning, and in 4 bits."""
        from blur_trainer.data.formats import tokenize_dataset
        from blur_trainer.evaluation.robustness.battery import quantized
        from blur_trainer.evaluation.robustness.relearning import relearn

        tokens = tokenize_dataset(self.rows["forget"], self.tokenizer, role="forget", max_length=512).to_list()
        before, after = (point["metrics"] for point in relearn(model, tokens, self.measure, **RELEARN))
        return {"before": before, "relearned": after, "4 bit": quantized(model, self.measure, bits=4)}


def jobs(seeds: int) -> list[str]:
    """Their names."""
    trained = [f"{kind}: {seed}" for kind in (*KNOWS, *NEVER) for seed in range(seeds)]
    return [*trained, "retrained", *(f"unlearned: {method}" for method in METHODS)]


def perform(name: str, out: Path) -> dict[str, Any]:
    """What the job of this name finds."""
    import datasets
    from transformers import AutoModelForCausalLM

    from blur_trainer import unlearn

    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    world = World(out)
    kind, _, which = name.partition(": ")
    if kind in (*KNOWS, *NEVER):
        return world.measure(world.trained(kind, int(which)))
    folder: Any = world.retrained
    if kind == "unlearned":
        folder = out / "unlearned" / which
        sets = (world.rows["forget"], world.data["retain"].select_columns(["question", "answer"]).to_list())
        unlearn(world.target, *sets, folder, method=which, use_cpu=True, disable_tqdm=True)
    return world.attacked(AutoModelForCausalLM.from_pretrained(folder).eval())


def table(found: Mapping[str, Any]) -> str:
    """One row for each metric, the most trustworthy first."""

    def of(kinds: tuple[str, ...]) -> list[dict[str, float]]:
        return [value for name, value in found.items() if name.split(": ")[0] in kinds]

    knows, never, unlearned = of(KNOWS), of(NEVER), of(("unlearned",))
    rows = []
    for metric in (name for name in found["retrained"]["before"] if name not in OTHER):
        values = [each[metric] for each in (*knows, *never)]
        truth = [1] * len(knows) + [0] * len(never)
        auc = float(roc_auc_score(truth, values))
        alike = [
            float(roc_auc_score([1] * len(of((a,))) + [0] * len(of((b,))), [x[metric] for x in of((a,)) + of((b,))]))
            for a, b in (("knows", "never"), ("knows, other words", "never, wrong answers"))
        ]
        control = found["retrained"]
        gain = control["relearned"][metric] - control["before"][metric]
        r = [_share(gain, each["relearned"][metric] - each["before"][metric]) for each in unlearned]
        q = [_share(each["before"][metric], each["4 bit"][metric]) for each in unlearned]
        robust = _harmonic(float(np.mean(r)), float(np.mean(q)))
        rows.append((metric, auc, *alike, float(np.mean(r)), float(np.mean(q)), robust, _harmonic(auc, robust)))
    rows.sort(key=lambda row: -row[-1])
    head = ("metric", "faithful", "plain", "look-alikes", "R", "Q", "robust", "total")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    lines += ["| " + " | ".join([f"`{row[0]}`", *(f"{value:.2f}" for value in row[1:])]) + " |" for row in rows]
    return "\n".join(
        [f"{len(knows)} models that know, {len(never)} that never knew, {len(unlearned)} unlearned", *lines]
    )


def _share(part: float, whole: float) -> float:
    """min(part / whole, 1), and not below 0; 1 where the whole does not rise, so nothing came back."""
    return 1.0 if whole <= max(part, 0.0) or whole <= 0 else max(part / whole, 0.0)


def _harmonic(a: float, b: float) -> float:
    return 0.0 if a + b == 0 else 2 * a * b / (a + b)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5, help="models of each of the four kinds")
    parser.add_argument("--jobs", type=int, default=1, help="processes, one core each")
    parser.add_argument("--table", action="store_true", help="print what there is, train nothing")
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    path = words.out / "meta.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = {name: value for line in lines for name, value in json.loads(line).items()}
    if not words.table:
        World(words.out)  # makes target and retrained model
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(words.jobs, mp_context=context) as pool:
            running = {pool.submit(perform, name, words.out): name for name in jobs(words.seeds) if name not in found}
            for future in as_completed(running):
                name = running[future]
                found[name] = future.result()
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({name: found[name]}) + "\n")
                print(name, flush=True)
    print(table(found))


if __name__ == "__main__":
    main()

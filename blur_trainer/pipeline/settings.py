"""Settings that follow from the model and the data. What led to each number: docs/your-own-data.md."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import PartialState
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedTokenizerBase

from blur_trainer.constants import IGNORE_INDEX, ROLES
from blur_trainer.data.encoding import leading_special_ids
from blur_trainer.pipeline.methods import METHODS
from blur_trainer.uld.trainer import ULDTrainer

#: a rate that suits the 3 M parameters of the testbed, and how fast it falls with the size
_RATE, _SIZE, _POWER = 1e-3, 3e6, 0.4
#: LoRA's and ULD's rates, in those of all parameters
_LORA, _ULD = 10.0, 5.0
#: BLUR-RMU's strength for an adapter, which reaches the level later than all weights do
_LORA_GAMMA = 0.7
#: optimizer steps, in at least so many epochs. Few rows take as many steps: with less the rest is not repaired. The
#: others are for methods about one layer, which break more at first, and repair it in the later half: an adapter later
_STEPS, _LAYERED_STEPS, _LAYERED_LORA_STEPS, _EPOCHS = 200, 400, 600, 3
_BATCH = 8
#: texts to replay: so many per retain row, within bounds; of at most so many tokens
_REPLAY, _REPLAYED, _REPLAY_TOKENS = 3, (512, 2048), 256
#: of the prompts that fill up what the model repeats: the share of tokens exchanged for random ones. Only where
#: activations are held in place: as targets of a likelihood, answers to no question cost the retain set
_SCRAMBLED = 0.5
_FRAMES = 64  # tokens that ULD's paraphrases add to a short row
_DEPTH = 0.25  # RMU's layer, as a share of the model's


@dataclass(frozen=True)
class Size:
    """What of a model decides: the number of its decoder layers and parameters, and the longest text it takes."""

    layers: int
    parameters: int
    positions: int | None

    @classmethod
    def of(cls, config: PreTrainedConfig) -> "Size":
        """Counted on the meta device: no weight is made or read."""
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        text = config.get_text_config(decoder=True)
        positions = getattr(text, "max_position_embeddings", None)
        return cls(text.num_hidden_layers, sum(p.numel() for p in model.parameters()), positions)


def process_count() -> int:
    """How many processes share the training. Accelerate counts those on CPUs only when a configuration is made."""
    return max(PartialState().num_processes, int(os.environ.get("WORLD_SIZE", "1")))


def derived(
    method: str,
    size: Size,
    forget: Sequence[Any],
    retain: Sequence[Any],
    start: Sequence[str] | str | None,
    lora: bool,
    processes: int = 1,
) -> dict[str, Any]:
    """
    The settings of a training that nobody has chosen. Where RMU steers is decided later, see `pipeline.steering`.

    Args:
        method: a name in `METHODS`.
        size: of the model.
        forget, retain: tokenized examples.
        start: what texts to replay begin with, see [`replay`]; `None`: the tokenizer's start.
        lora: whether an adapter is trained.
        processes: that share the training. Batch and optimizer steps of all together are those of one.
    """
    chosen = METHODS[method]
    rate = _RATE * min(1.0, (_SIZE / size.parameters) ** _POWER)
    lengths = sorted(len(row["input_ids"]) for row in retain)
    layered_steps = _LAYERED_LORA_STEPS if lora else _LAYERED_STEPS
    settings: dict[str, Any] = {
        "learning_rate": _rounded(rate * (_LORA if lora else 1.0)),
        "lr_scheduler_type": "linear",
        **_batches(len(forget), processes, layered_steps if chosen.layered else _STEPS),
        "per_device_eval_batch_size": 16,
        "max_length": _length([*forget, *retain], size.positions),
        "logging_steps": 10,
        "logging_first_step": True,
        "save_strategy": "no",
        "report_to": "none",
        "replay": int(min(max(_REPLAY * len(retain), _REPLAYED[0]), _REPLAYED[1])),
        "replay_kwargs": {
            "max_new_tokens": min(max(8, lengths[int(0.95 * (len(lengths) - 1))]), _REPLAY_TOKENS),
            **({"scrambled": _SCRAMBLED} if chosen.layered else {}),
            **({} if start is None else {"prompts": start}),
        },
    }
    if chosen.layered:
        layer = min(size.layers - 1, max(1, round(_DEPTH * size.layers)))
        layered = {"layer": layer, "skip_shared_start": True}
        settings |= {f"{role}_objective_kwargs": dict(layered) for role in ROLES}
    if chosen.trainer is ULDTrainer:
        settings["learning_rate"] = _rounded(rate * _ULD)
        # paraphrases are longer: a frame of some ten words stands around a question and around an answer
        settings["max_length"] = _limited(2 * settings["max_length"] + _FRAMES, size.positions)
        settings["num_assistant_layers"] = max(1, size.layers // 2 if size.layers < 12 else size.layers // 4)
    settings |= chosen.settings
    if lora and chosen.layered and "gamma" in settings:
        settings["gamma"] = _LORA_GAMMA
    return settings


def start_of_texts(
    tokenizer: PreTrainedTokenizerBase, retain: Sequence[Any], template: bool, public: str | None = None
) -> list[str] | str | None:
    """
    What texts that the model says itself begin with: the words that all prompts begin with, such as `Question:`.

    `"retain"`, the prompts themselves, where they begin unlike one another or are written by a chat template; `None`,
    the tokenizer's start, for texts that have no prompt. Where it has none, `"retain"`: the first words of the texts.

    Args:
        retain: tokenized examples.
        template: whether a chat template writes the prompts.
        public: of a run that keeps the users' words to itself: the words that all prompts may begin with. Beyond them
            it is the users' words.
    """
    prompts = [
        [t for t, label in zip(row["input_ids"], row["labels"], strict=True) if label == IGNORE_INDEX] for row in retain
    ]
    asked = tokenizer.batch_decode([ids for ids in prompts if ids], skip_special_tokens=True)
    asked = [text for text in asked if text.strip()]
    if not asked:
        return None if leading_special_ids(tokenizer) or tokenizer.bos_token_id is not None else "retain"
    if template:
        return "retain"
    common = os.path.commonprefix(asked)  # noqa: RUF071 -- by characters is meant
    words = common.rsplit(" ", 1)[0].strip() if not common.endswith((" ", ":")) else common.strip()
    if public is not None:
        words = public if public and words.startswith(public) else ""
    return [words] if words and len(asked) > 1 else "retain"


def _batches(rows: int, processes: int, steps: int) -> dict[str, int]:
    """The batch of each process, and so many epochs that there are at least the steps of one process alone."""
    whole = min(_BATCH, rows)
    own = max(1, whole // processes)
    alone, shared = math.ceil(rows / whole), math.ceil(rows / (own * processes))  # steps per epoch
    epochs = max(math.ceil(steps / alone), _EPOCHS)
    return {"per_device_train_batch_size": own, "num_train_epochs": math.ceil(epochs * alone / shared)}


def _length(rows: Sequence[Any], positions: int | None) -> int:
    """The longest example, and not more than the model or 2048 tokens."""
    return _limited(max(len(row["input_ids"]) for row in rows), positions)


def _limited(length: int, positions: int | None) -> int:
    return min(length, 2048 if positions is None else min(positions, 2048))


def _rounded(rate: float) -> float:
    return float(f"{rate:.1e}")

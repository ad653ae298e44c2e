"""The settings of `unlearn` for a training of one's own."""

from typing import Any

from transformers import AutoTokenizer

from blur_trainer.constants import ROLES
from blur_trainer.data.chat import has_chat_template
from blur_trainer.data.formats import tokenize_dataset
from blur_trainer.evaluation.level import Level
from blur_trainer.evaluation.own_share import own_shares
from blur_trainer.evaluation.row_losses import loaded_with_tokenizer
from blur_trainer.models.loading import hub_arguments, read_config
from blur_trainer.pipeline.methods import DEFAULT, DISTILL, METHODS
from blur_trainer.pipeline.settings import Size, derived, process_count, start_of_texts
from blur_trainer.pipeline.steering import LEAST, is_open, steered
from blur_trainer.pipeline.teacher import target_of


def recommended(
    model: str,
    forget: Any,
    retain: Any,
    *,
    method: str = DEFAULT,
    level: Level | float | None = None,
    lora: bool = False,
) -> dict[str, Any]:
    """
    The settings that [`unlearn`] derives from model and data, as arguments of the method's configuration.

    It loads the model where there is no level, and for `blur` and `rmu`: what answers cost says where to steer.

    Args:
        model (`str`): a folder or a name on the Hub. Its tokenizer is beside it.
        forget, retain: in the formats of the trainers.
        method (`str`): as of [`unlearn`]; `"blur"` is for [`BLURConfig`], `"uld"` for [`ULDConfig`].
        level ([`Level`] or `float`, *optional*): where forgetting ends. Default: `Level.of_exchanged`, an estimate.
        lora (`bool`): whether an adapter will be trained.

    Raises:
        `ValueError`: there is no such method; what `Level` and [`tokenize_dataset`] refuse.

    Example:

    ```python
    args = BLURConfig("out", **recommended("my-model", forget, retain))
    trainer = BLURTrainer("my-model", args, forget, retain)
    ```
    """
    if method not in METHODS:
        raise ValueError(f"`method` is {method!r}: choose among {', '.join(METHODS)}.")
    if method == DISTILL:
        model = target_of(model, {}).name
    size = Size.of(read_config(model, {}))
    tokenizer = AutoTokenizer.from_pretrained(model, **hub_arguments({}))
    sets = dict(zip(ROLES, (forget, retain), strict=True))
    tokenized = {
        role: tokenize_dataset(rows, tokenizer, role=role, max_length=size.positions) for role, rows in sets.items()
    }
    start = start_of_texts(tokenizer, tokenized["retain"], has_chat_template(tokenizer))
    settings = derived(method, size, tokenized["forget"], tokenized["retain"], start, lora, process_count())
    chosen, length = METHODS[method], settings["max_length"]
    undecided, unmeasured = is_open(settings, chosen.layered), chosen.leveled and level is None
    loaded = loaded_with_tokenizer(model, tokenizer)[0] if undecided or unmeasured else None
    if undecided:
        shares = own_shares(loaded, forget, retain, tokenizer, least=LEAST, max_length=length)
        settings |= steered(settings, shares)
    if chosen.leveled:
        found = Level.of_exchanged(loaded, forget, retain, tokenizer, max_length=length) if level is None else level
        settings["forget_level"] = found.nats if isinstance(found, Level) else float(found)
    return settings

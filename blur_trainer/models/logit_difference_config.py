"""The configuration of a logit-difference model: which parts it has and how their logits are combined."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from blur_trainer.models.carried_code import AUTO_MAP, write_code
from blur_trainer.models.logit_composition import check_composition, composition_named
from blur_trainer.models.origin import record


class LogitDifferenceConfig(PreTrainedConfig):
    """
    Names the target and says how its assistant's logits are composed with its own.

    Args:
        target (`str`, *optional*):
            Folder or hub id of the target. Default: the name that the target was loaded by. A relative folder is one
            beside the configuration.
        num_assistant_layers (`int`, *optional*):
            Number of the assistant's layers. Default: counted.
        weight (`float`, *optional*), top_logit_filter (`float`, *optional*):
            As in [`logit_difference`]. Defaults: -0.8 and 0.01 for `"uld"` (the values of its scripts for TOFU), 1 and
            0 for `"offset"`, -1 and 0 for `"whp"`. May be changed between two calls.
        composition (`str`, defaults to `"uld"`):
            One of [`COMPOSITIONS`].
        assistant (`str`, *optional*):
            Folder or hub id of the model below the assistant's adapter, if it is not the target itself.
        origins (`dict`, *optional*):
            Of target and assistant, by name, what they were when the model was saved: `{"folder": digest}` or
            `{"hub": commit}`. Filled in by `save_pretrained`, checked by `from_pretrained`.
        text_config ([`~transformers.PreTrainedConfig`], *optional*):
            The target's configuration. Default: taken from the target.
    """

    model_type = "logit_difference"
    sub_configs = {"text_config": AutoConfig}  # noqa: RUF012 -- as in every composed configuration

    target: str | None = None
    num_assistant_layers: int | None = None
    weight: float | None = None
    top_logit_filter: float | None = None
    composition: str = "uld"
    assistant: str | None = None
    origins: dict[str, Any] | None = None
    text_config: dict | PreTrainedConfig | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        usual = composition_named(self.composition)
        self.weight = usual.weight if self.weight is None else self.weight
        self.top_logit_filter = usual.top_logit_filter if self.top_logit_filter is None else self.top_logit_filter
        check_composition(self.weight, self.top_logit_filter)
        if isinstance(self.text_config, dict):
            self.text_config = AutoConfig.for_model(**self.text_config)
        super().__post_init__(**kwargs)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Writes `config.json` and, beside it, the code with which transformers loads the folder by itself."""
        self.auto_map = dict(AUTO_MAP)
        super().save_pretrained(save_directory, **kwargs)
        write_code(save_directory)

    def record_origins(self) -> None:
        """Records what target and assistant are now, where it is not recorded yet. Paths become absolute."""
        known = dict(self.origins or {})
        for part in ("target", "assistant"):
            name = getattr(self, part)
            if name and name not in known:
                name, origin = record(name)
                setattr(self, part, name)
                known[name] = origin
        self.origins = {name: known[name] for name in (self.target, self.assistant) if name} or None

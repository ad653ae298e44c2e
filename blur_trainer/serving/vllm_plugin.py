"""Registers the logit-difference model with vLLM: the entry point `vllm.general_plugins` of this package.

vLLM calls [`register`] in each of its processes. After that `vllm serve FOLDER` serves what ULD, offset unlearning and
WHP save.
"""

from transformers import AutoConfig

from blur_trainer.models.logit_difference_config import LogitDifferenceConfig

ARCHITECTURE = "LogitDifferenceModel"  # as `save_pretrained` writes it into config.json
IMPLEMENTATION = "blur_trainer.serving.vllm_model:ServedLogitDifference"


def register() -> None:
    """Tells transformers and vLLM which classes read such a folder. May be called more than once."""
    from vllm import ModelRegistry

    AutoConfig.register(LogitDifferenceConfig.model_type, LogitDifferenceConfig, exist_ok=True)
    ModelRegistry.register_model(ARCHITECTURE, IMPLEMENTATION)  # by name: vLLM imports it where it is needed

"""Lets a shorter vLLM model use the weights of a longer one of the same class."""

from torch import nn
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


def share_weights(short: nn.Module, long: nn.Module) -> None:
    """
    Puts the parameters of `long` in place of those of the same names in `short`. Attention layers stay `short`'s own.

    Linear layers and embeddings are shared as whole modules: after loading, vLLM may repack their weights, and must do
    so once. The freed copies were never loaded; they cost their memory while the model is built.

    Raises:
        `ValueError`: a parameter of `short` is not in `long`, or belongs to a layer of experts.
    """
    for name, module in list(short.named_modules()):
        if isinstance(module, (LinearBase, VocabParallelEmbedding)):
            short.set_submodule(name, long.get_submodule(name))
            continue
        own = [key for key, _ in module.named_parameters(recurse=False)]
        if own and isinstance(getattr(module, "quant_method", None), QuantizeMethodBase):
            raise ValueError(f"{name} is a `{type(module).__name__}`: its weights cannot be shared by two models.")
        for key in own:
            setattr(module, key, getattr(long.get_submodule(name), key))
    shared = {id(parameter) for parameter in long.parameters()}
    alone = [name for name, parameter in short.named_parameters() if id(parameter) not in shared]
    if alone:
        raise ValueError(f"{alone[0]} of `{type(short).__name__}` is not shared with the target: not supported.")

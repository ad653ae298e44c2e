"""The key-value caches of a target and its assistants as one cache."""

from transformers import Cache, DynamicCache, PreTrainedConfig


class LogitDifferenceCache(Cache):
    """The caches of all parts as one list of layers. So reordering, cropping and resetting reach each of them.

    `base` (the assistant without its adapter) exists only under the composition `"offset"`.
    """

    def __init__(self, target: Cache, assistant: Cache, base: Cache | None = None) -> None:
        super().__init__(layers=[*target.layers, *assistant.layers, *(base.layers if base else [])])
        self.target, self.assistant, self.base = target, assistant, base


def composite_cache(
    cache: Cache | None, target: PreTrainedConfig, assistant: PreTrainedConfig, pair: bool, weight: float
) -> LogitDifferenceCache:
    """Makes the joint cache: `generate` starts with an empty target cache and then passes what `forward` returned."""
    if not isinstance(cache, LogitDifferenceCache):
        cache = DynamicCache(config=target) if cache is None else cache
        if not isinstance(cache, DynamicCache) or cache.get_seq_length() or not cache.layers:
            raise ValueError(
                f"past_key_values is a `{type(cache).__name__}` with {len(cache)} layers, {cache.get_seq_length()} "
                "tokens. Both parts need a cache: leave it out (`cache_implementation` too), or give what an "
                "earlier call returned, or an empty DynamicCache(config=model.config)."
            )
        base = DynamicCache(config=assistant) if pair else None
        cache = LogitDifferenceCache(cache, DynamicCache(config=assistant), base)
    if pair and cache.base is None:
        raise ValueError("The cache was begun by another composition, which reads one assistant. Begin a new one.")
    held = cache.target.get_seq_length()
    for name, part in {"assistant": cache.assistant, "base": cache.base if pair else None}.items():
        if weight != 0 and part is not None and part.get_seq_length() != held:
            raise ValueError(
                f"The cache holds {held} tokens of the target and {part.get_seq_length()} of the {name}: it was begun "
                "with config.weight=0, or under another composition. Begin a new one."
            )
    return cache

"""For tests/models/test_fused_head.py: two processes under DDP, one with a long batch, one with a short one, in turn.

Only the long one goes through the fused head. Every process compares the gradient with that of one process.
"""

import torch
from support.models import VOCAB, collate, examples, tiny_llama
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from blur_trainer.models.forward import answer_logps, choose_head, takes_fused_head
from blur_trainer.models.fused_heads import logits_bytes

BATCHES = [collate(examples(2, seed=1, low=5, high=7)), collate(examples(4, seed=2, low=9, high=14))]


def main() -> None:
    distributed.init_process_group("gloo")
    rank, plain = distributed.get_rank(), tiny_llama(tie=True)
    for batch in BATCHES:
        answer_logps(plain, batch).sum().backward()
    wrapped = DistributedDataParallel(tiny_llama(tie=True))
    choose_head(wrapped.module, True, torch.device("cpu"))
    wrapped.module.fused_lm_head_from = logits_bytes(20, VOCAB)
    for step in range(3):  # DDP makes other buckets after the first
        batch = BATCHES[(rank + step) % 2]
        assert takes_fused_head(wrapped, batch) is ((rank + step) % 2 == 1)
        wrapped.zero_grad()
        answer_logps(wrapped, batch).sum().backward()
        for mine, want in zip(wrapped.module.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(2 * mine.grad, want.grad, rtol=1e-4, atol=1e-5 * float(want.grad.abs().max()))
    distributed.destroy_process_group()


if __name__ == "__main__":
    main()

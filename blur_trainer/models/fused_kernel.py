"""Whether the Triton kernel of TRL's fused LM head runs on a device. To know, run it.

Triton compiles the kernel at its first call, and the C code that launches it: with a C compiler and Python's headers.
So an installed Triton is not enough.
"""

import functools
import subprocess

import torch
from transformers.utils import is_triton_available
from trl.kernels import ChunkedLogProbFunction

#: where TRL's fused head is a Triton kernel; elsewhere it is torch's own operations
TRITON_DEVICES = ("cuda", "xpu")
_NEEDS = "It needs Triton, a C compiler and Python's headers (on Debian and Ubuntu: `apt install gcc python3-dev`)"


@functools.cache
def kernel_obstacle(device: torch.device) -> str | None:
    """Why the kernel does not run there. `None` if it does. Asked once per device and process."""
    if device.type not in TRITON_DEVICES:
        return None
    if not is_triton_available():
        return "Triton, in which its kernel is written, is not installed: `pip install triton`"
    from triton.errors import TritonError

    try:
        run_kernel(device)
    # No compiler or a driver's error: RuntimeError. A compiler that fails: SubprocessError. A cache that cannot be
    # written: OSError. A launcher that does not load: ImportError. No libcuda: AssertionError.
    except (TritonError, RuntimeError, subprocess.SubprocessError, OSError, ImportError, AssertionError) as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        return f"its Triton kernel does not run on {device} ({type(error).__name__}: {reason[:200]}). {_NEEDS}"
    return None


def run_kernel(device: torch.device) -> None:
    """Runs the fused head's function on two tokens and three words, forward and backward, and waits for the result."""
    hidden = torch.ones(2, 16, device=device, requires_grad=True)
    weight = torch.ones(3, 16, device=device)
    targets = torch.tensor([0, 2], device=device)
    logps, *_ = ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, 1024, None, 1.0, ("log_probs",))
    torch.autograd.grad(logps.sum(), hidden)[0].sum().item()  # errors of a device arrive here

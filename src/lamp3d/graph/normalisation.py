"""Instance norm by the fastest of torch's kernels that compute the same.

torch turns it into a batch norm of (1, B·C, D, H, W). On a CPU that takes three times as long as a group norm with a
group for every channel, and it brings channels-last values into the other layout and leaves its result there. Batch
norm itself keeps channels-last, but it adds up one value after the other, which in fp32 costs two digits; beside the
roundings of bf16 values that is nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def instance_norm(
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Tensor | None:
    """``torch.nn.functional.instance_norm`` of a volume; None where it is best left to torch."""
    of_values = use_input_stats and running_mean is None and input.dim() == 5 and input[0, 0].numel() > 1
    if not of_values or input.device.type != "cpu" or input.dtype not in (torch.float32, torch.bfloat16):
        return None
    if input.stride(1) != 1:
        return F.group_norm(input, input.shape[1], weight, bias, eps)
    if input.shape[0] == 1 and input.dtype == torch.bfloat16:
        return F.batch_norm(input, None, None, weight, bias, training=True, eps=eps)
    return None

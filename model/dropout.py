"""Activations in, the same with some zeroed out: dropout that is cheap on CPUs, too."""

import torch
import torch.nn.functional as F


def drop_out(values: torch.Tensor, probability: float) -> torch.Tensor:
    """Zeros at a rate of `probability`, the rest scaled to keep the mean (Srivastava et al. 2014).

    On CPUs torch draws one random number per value, which takes a sixth of a training step; four
    values share one here, 16 bits each. So the rate is rounded to 1 / 65536; the scale is that of
    the rounded rate. Elsewhere this is `torch.nn.functional.dropout`, the twin to compare with.
    """
    if probability == 0 or values.device.type != "cpu":
        return F.dropout(values, probability)
    num_dropped = min(round(probability * 65536), 65535)  # of 65536 equally likely numbers
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    draws = draws.view(torch.int16)[: values.numel()].view(values.shape)
    kept = (draws >= num_dropped - 32768).to(values.dtype)
    return values * kept.mul_(65536 / (65536 - num_dropped))

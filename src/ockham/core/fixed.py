"""Entries of parameters that a network's own modules hold fixed: padding rows, and what pruning masks hold at zero."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = [
    "fixed_entries",
]

_PADDED = (nn.Embedding, nn.EmbeddingBag)


def fixed_entries(model: nn.Module) -> dict[str, Tensor]:
    """Which weights the network itself never trains, as boolean masks (True = fixed).

    Fixed are the row ``padding_idx`` of `torch.nn.Embedding` and `torch.nn.EmbeddingBag`, and the entries where a mask
    of `torch.nn.utils.prune` is zero: a buffer ``<name>_mask`` beside the parameter ``<name>_orig``. A buffer
    ``<name>_mask`` of zeros and ones beside the parameter ``<name>`` itself, the usual form of home-made masks, counts
    where the weights are zero already. A parameter that several modules share is fixed only where all of them say so.

    Args:
        model: any network; it is not changed.

    Returns:
        Mask of the parameter's shape by parameter name; parameters without a fixed entry are left out.

    >>> fixed_entries(nn.Sequential(nn.Embedding(4, 2, padding_idx=3)))["0.weight"].tolist()
    [[False, False], [False, False], [False, False], [True, True]]
    """
    claims: dict[Tensor, list[Tensor | None]] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                claims.setdefault(parameter, []).append(_claim(module, name, parameter))
    found = {}
    for name, parameter in model.named_parameters():
        masks = [mask for mask in claims[parameter] if mask is not None]
        if len(masks) == len(claims[parameter]) and bool((fixed := torch.stack(masks).all(0)).any()):
            found[name] = fixed
    return found


@torch.no_grad()
def _claim(module: nn.Module, name: str, parameter: Tensor) -> Tensor | None:
    """What one module says of its parameter; None where it fixes nothing."""
    if isinstance(module, _PADDED) and name == "weight" and module.padding_idx is not None:
        fixed = torch.zeros_like(parameter, dtype=torch.bool)
        fixed[module.padding_idx] = True
        return fixed
    mask = module._buffers.get(f"{name.removesuffix('_orig')}_mask")
    if mask is None or mask.shape != parameter.shape or not bool(((mask == 0) | (mask == 1)).all()):
        return None
    fixed = (mask == 0).to(parameter.device)
    return fixed if name.endswith("_orig") else fixed & (parameter == 0)

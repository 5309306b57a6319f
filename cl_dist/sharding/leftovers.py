"""What a destroyed DeepSpeed engine leaves in the model, and the next engine would stumble over."""

from __future__ import annotations

import torch

_LEFT = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")


def remove_leftovers(model: torch.nn.Module) -> None:
    """Let a new engine of stage 3 find the modules as the first one did.

    Stage 3 puts functions into every module that fetch its parameters in the backward pass, and that belong to one
    engine; the next one finds them there and makes none of its own, so that backward would go on by the old engine's
    record of which module follows which. Parameters that a module uses of another one are found again at the first
    forward pass.
    """
    for module in model.modules():
        for name in _LEFT:
            module.__dict__.pop(name, None)
        getattr(module, "_external_params", {}).clear()

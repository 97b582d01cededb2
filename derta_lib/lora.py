"""LoRA as it is trained here: which weights, and W x + s·B A x written into one output.

PEFT's own forward makes four tensors as large as the output, and autograd as many gradients; on a CPU each of them
costs time that the products could use.
"""

from functools import partial
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import Linear
from torch.nn import functional as F


def config(rank: int, alpha: int) -> LoraConfig:
    """LoRA on all linear layers, attention and MLP, without dropout."""
    return LoraConfig(r=rank, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM")


def adapted(model: Any, rank: int, alpha: int) -> PeftModel:
    """The model with LoRA, ready to be trained; layers of another kind than nn.Linear keep PEFT's forward."""
    made = get_peft_model(model, config(rank, alpha))
    for module in made.modules():
        if isinstance(module, Linear) and type(module.base_layer) is torch.nn.Linear:
            module.forward = partial(_forward, module)  # type: ignore[method-assign]
    return made


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    base, (name,) = module.base_layer, module.active_adapters
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    return _Product.apply(x, base.weight, base.bias, a, b, module.scaling[name])


class _Product(torch.autograd.Function):
    """x [..., m], a frozen weight W [n, m] and bias [n], A [r, m] and B [n, r] give W x + bias + s·B A x [..., n]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        w: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        s: float,
    ) -> torch.Tensor:
        flat, a, b = x.flatten(0, -2).to(w.dtype), a.to(w.dtype), b.to(w.dtype)
        low = flat @ a.T
        ctx.save_for_backward(flat, w, a, b, low)
        ctx.scaling, ctx.shape = s, x.shape
        return F.linear(flat, w, bias).addmm_(low, b.T, alpha=s).view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        flat, w, a, b, low = ctx.saved_tensors
        up = gradients[0].flatten(0, -2)
        down = ctx.scaling * (up @ b)
        of_x = (up @ w).addmm_(down, a).view(ctx.shape) if ctx.needs_input_grad[0] else None
        return of_x, None, None, (flat.T @ down).T, ctx.scaling * (up.T @ low), None

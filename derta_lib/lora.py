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
    if module.disable_adapters or module.merged or len(module.active_adapters) != 1:
        return Linear.forward(module, x)
    base, (name,) = module.base_layer, module.active_adapters
    a, b = module.lora_A[name].weight, module.lora_B[name].weight
    product = _Product.apply(x.flatten(0, -2), base.weight, base.bias, a, b, module.scaling[name])
    return product.view(*x.shape[:-1], len(base.weight))


class _Product(torch.autograd.Function):
    """x [L, m], a frozen weight W [n, m] and bias [n], A [r, m] and B [n, r] give W x + bias + s·B A x [L, n]."""

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
        out = F.linear(x, w, bias)
        x, w, a, b = (each.to(out.dtype) for each in (x, w, a, b))  # autocast chooses; the adapter is in float32
        low = x @ a.T
        ctx.save_for_backward(x, w, a, b, low)
        ctx.scaling = s
        return out.addmm_(low, b.T, alpha=s)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (up,), (x, w, a, b, low) = gradients, ctx.saved_tensors
        down = ctx.scaling * (up @ b)
        of_x = (up @ w).addmm_(down, a) if ctx.needs_input_grad[0] else None
        return of_x, None, None, (x.T @ down).T, ctx.scaling * (up.T @ low), None

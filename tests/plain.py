"""What the core is tested against: models' plain forward passes, without any of the library's code."""

import copy
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    Cohere2Config,
    Gemma2Config,
    Gemma3TextConfig,
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    OlmoConfig,
    Phi3Config,
    Qwen2Config,
    Qwen3Config,
)

VOCABULARY = 61
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.2,
}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
CONFIGS: dict[str, Any] = {
    "llama": LlamaConfig(**SHAPE),
    "mistral": MistralConfig(**SHAPE, sliding_window=6),
    "mixtral": MixtralConfig(**SHAPE, sliding_window=6, num_local_experts=4, num_experts_per_tok=2),
    "qwen2": Qwen2Config(**SHAPE, use_sliding_window=True, sliding_window=6, layer_types=LAYERS),
    "qwen3": Qwen3Config(**SHAPE, head_dim=8, use_sliding_window=True, sliding_window=6, layer_types=LAYERS),
    "gemma": GemmaConfig(**SHAPE, head_dim=8),
    "gemma2": Gemma2Config(
        **SHAPE,
        head_dim=8,
        sliding_window=6,
        layer_types=LAYERS,
        final_logit_softcapping=2.0,
        attn_logit_softcapping=1.0,
    ),
    "gemma3": Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=6, layer_types=LAYERS),
    "phi3": Phi3Config(**SHAPE, sliding_window=6),
    "olmo": OlmoConfig(**SHAPE, clip_qkv=0.5),
    "cohere2": Cohere2Config(**SHAPE, sliding_window=6, layer_types=LAYERS, logit_scale=0.3),
    "granite": GraniteConfig(**SHAPE, logits_scaling=3.0, attention_multiplier=0.5, residual_multiplier=0.5),
}
"""Tiny configurations; every sliding window is shorter than the rows."""


def tiny(family: str, attention: str | None = None) -> Any:
    """A random float32 model of a family."""
    torch.manual_seed(0)
    named = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[family]), dtype=torch.float32, **named).eval()


def loss_of_row(model: Any, ids: list[int], position: int, target: int) -> torch.Tensor:
    """−log P(target | ids[: position + 1]) from a forward pass over that start alone."""
    return torch.nn.functional.cross_entropy(
        model(input_ids=torch.tensor([ids[: position + 1]])).logits[0, -1:].float(), torch.tensor([target])
    )


def relative(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return ((ours - plain).norm() / plain.norm().clamp_min(1e-12)).item()

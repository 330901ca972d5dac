"""Tiny models of many families, each from its own config class."""

import torch
import transformers as T
from torch import nn

from mole_vl import Expert, Factors
from mole_vl.layers import layer_shapes

IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, **IDS,
}  # fmt: skip
GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 64, **IDS}
NEO = {
    "vocab_size": 40, "hidden_size": 16, "num_layers": 2, "num_heads": 4, "window_size": 4,
    "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, **IDS,
}  # fmt: skip
NEOX = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
MOE = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2}
CAUSAL = {
    "llama": lambda: T.LlamaConfig(**SIZES),
    "mistral": lambda: T.MistralConfig(**SIZES),
    "qwen2": lambda: T.Qwen2Config(**SIZES),
    "qwen3": lambda: T.Qwen3Config(**SIZES, head_dim=4),
    "gemma": lambda: T.GemmaConfig(**SIZES, head_dim=4),
    "gemma3": lambda: T.Gemma3TextConfig(**SIZES, head_dim=4),
    "phi": lambda: T.PhiConfig(**SIZES),
    "phi3": lambda: T.Phi3Config(**SIZES),
    "gpt2": lambda: T.GPT2Config(**GPT2),
    "gpt_neo": lambda: T.GPTNeoConfig(**NEO),
    "gpt_neox": lambda: T.GPTNeoXConfig(**NEOX),
    "mixtral": lambda: T.MixtralConfig(**SIZES, num_local_experts=4),
    "qwen2_moe": lambda: T.Qwen2MoeConfig(**SIZES, **MOE, shared_expert_intermediate_size=16),
    "qwen3_moe": lambda: T.Qwen3MoeConfig(**SIZES, **MOE, head_dim=4),
}
T5 = {
    "vocab_size": 40, "d_model": 16, "d_kv": 4, "d_ff": 24, "num_layers": 2, "num_heads": 4,
    "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "dropout_rate": 0.0,
}  # fmt: skip
BART = {
    "vocab_size": 40, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2,
    "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24, "max_position_embeddings": 64, "decoder_start_token_id": 2,
    "forced_eos_token_id": None, "dropout": 0.0, **IDS,
}  # fmt: skip
SEQ2SEQ = {
    "t5": lambda: T.T5Config(**T5),
    "flan_t5": lambda: T.T5Config(**T5, feed_forward_proj="gated-gelu", tie_word_embeddings=False),
    "mt5": lambda: T.MT5Config(**T5),
    "bart": lambda: T.BartConfig(**BART),
}
VISION = {
    "hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 16, "patch_size": 8,
}  # fmt: skip
QWEN_VISION = {
    "depth": 2, "embed_dim": 24, "hidden_size": 16, "num_heads": 2, "patch_size": 4,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "mlp_ratio": 2,
}  # fmt: skip
ROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 0]}
IMAGE = 38
"""The token that stands for a patch of a picture."""


def llava() -> T.PreTrainedModel:
    """Sees pictures of 16 pixels as four patches."""
    torch.manual_seed(0)
    config = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION), text_config=T.LlamaConfig(**SIZES),
        image_token_index=IMAGE, vision_feature_layer=-1,
    )  # fmt: skip
    return lively(T.LlavaForConditionalGeneration(config))


def qwen2_vl() -> T.PreTrainedModel:
    """Sees pictures as a list of patches, four of which are one token."""
    torch.manual_seed(0)
    config = T.Qwen2VLConfig(
        text_config=dict(SIZES, rope_scaling=ROPE), vision_config=QWEN_VISION,
        image_token_id=IMAGE, video_token_id=37, vision_start_token_id=36, vision_end_token_id=35,
    )  # fmt: skip
    return lively(T.Qwen2VLForConditionalGeneration(config))


def seq2seq(family: str) -> T.PreTrainedModel:
    """A frozen encoder-decoder in eval mode."""
    torch.manual_seed(0)
    return lively(T.AutoModelForSeq2SeqLM.from_config(SEQ2SEQ[family]()))


def causal(family: str) -> T.PreTrainedModel:
    """A frozen model in eval mode, its weights large enough that experts show."""
    torch.manual_seed(0)
    return lively(T.AutoModelForCausalLM.from_config(CAUSAL[family]()))


def lively(model: nn.Module):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval().requires_grad_(False)


def experts_on(model: nn.Module, blocks, names=("ann", "bob"), size: float = 0.2) -> list[Expert]:
    """Experts of different ranks on every layer in the blocks that can take them.

    Not on the feed-forwards of a mixture of experts, which read tokens without rows.
    """
    generator = torch.Generator().manual_seed(7)
    inside = {
        path: shape
        for path, shape in layer_shapes(model).items()
        if any(path.startswith(f"{block}.") for block in blocks) and "shared_expert" not in path
    }
    return [
        Expert(
            name,
            {
                path: Factors(
                    torch.randn(rank, width, generator=generator),
                    torch.randn(out, rank, generator=generator),
                    size,
                )
                for path, (out, width) in inside.items()
            },
        )
        for rank, name in enumerate(names, start=1)
    ]

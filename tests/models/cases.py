"""``CASES`` and ``REFUSED``: other people's networks as they are, with records for them."""

from __future__ import annotations

import transformers as hf

from tests.models.modules import (
    Captions,
    Denoising,
    FineTuning,
    Forecast,
    ImageAutoencoder,
    NextToken,
    OwnCaptions,
    TwoTowers,
    choices,
    continuations,
    fixed,
    images,
    pairs,
    past_and_future,
    series,
    speech,
    text,
    vision,
    visits,
)
from tests.models.networks import (
    PIXELS,
    SMALL,
    bert,
    clip,
    convnext,
    deberta,
    gpt2,
    llama,
    mamba,
    minilm,
    patch_tst,
    resnet,
    segformer,
    swin,
    t5,
    whisper,
    with_loha,
    with_lora,
)
from tests.strategies.model_cases import Case


def small_images() -> list[dict]:
    return images(16)


CASES: dict[str, Case] = {
    "BERT": Case(lambda: FineTuning(bert()), text),
    "BERT, LoRA": Case(
        lambda: FineTuning(with_lora(bert(), "query", "value", train_also=("classifier",), lora_dropout=0.1)), text
    ),
    "MiniLM, LoRA": Case(lambda: FineTuning(with_lora(minilm(), "query", "value", train_also=("classifier",))), text),
    "GPT-2": Case(lambda: NextToken(gpt2()), text),
    "GPT-2, LoRA": Case(lambda: NextToken(with_lora(gpt2(), "c_attn", "c_proj", fan_in_fan_out=True)), text),
    "Llama": Case(lambda: NextToken(llama()), text),
    "ResNet, fixed": Case(lambda: fixed(FineTuning(resnet())), lambda: images(32)),
    "ViT": Case(vision(hf.ViTForImageClassification, hf.ViTConfig(**SMALL, **PIXELS)), small_images),
    "DINOv2": Case(vision(hf.Dinov2ForImageClassification, hf.Dinov2Config(**SMALL, **PIXELS)), small_images),
    "ConvNeXt": Case(lambda: FineTuning(convnext()), small_images),
    "Swin": Case(lambda: FineTuning(swin()), small_images),
    "GRU, fixed": Case(lambda: fixed(Forecast()), series),
    "image autoencoder": Case(ImageAutoencoder, lambda: images(8)),
    "two towers, tied tables": Case(TwoTowers, visits),
    "T5, whose first block hands its position bias on": Case(lambda: Denoising(t5()), text),
    "DoRA, which lends its weights out": Case(lambda: FineTuning(with_lora(bert(), "query", use_dora=True)), text),
    "LoHa, whose products are functions of autograd": Case(lambda: FineTuning(with_loha(bert(), "query")), text),
    "Mamba": Case(lambda: NextToken(mamba()), text),
    "DeBERTa": Case(lambda: FineTuning(deberta()), text),
    "Whisper": Case(lambda: FineTuning(whisper()), speech),
    "PatchTST": Case(lambda: FineTuning(patch_tst()), past_and_future),
    "SegFormer": Case(lambda: FineTuning(segformer()), small_images),
    "CLIP, each image with captions of its own": Case(lambda: OwnCaptions(clip()), choices),
}

REFUSED: dict[str, tuple[Case, str]] = {
    "ResNet": (Case(lambda: FineTuning(resnet()), lambda: images(32)), r"BatchNorm2d normalises .*lightning_dp\.fix"),
    "GPT-2's own loss": (
        Case(lambda: FineTuning(gpt2()), continuations),
        r"samples share a denominator.*loss of shape \(B,\)",
    ),
    "CLIP's loss": (Case(lambda: Captions(clip()), pairs), "two axes .*contrastive loss.*negatives of its own"),
}

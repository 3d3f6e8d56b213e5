"""Cases of pictures."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.public_cases.registry import BATCH, Task, case, fit


def images(size: int = 16, channels: int = 3, num: int = 64) -> DataLoader[Any]:
    """Return random pictures with labels."""
    torch.manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(num, channels, size, size), torch.arange(num) % 3), batch_size=BATCH)


@case("diffusers")
def unet2d(arguments: dict[str, Any]) -> None:
    """UNet2D under a denoising loss."""
    from diffusers import DDPMScheduler, UNet2DModel

    model = UNet2DModel(
        sample_size=16, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(8, 16),
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=50)

    def loss(net: Any, batch: Any) -> Any:
        noise = torch.randn_like(batch[0])
        times = torch.randint(0, 50, (len(noise),), device=noise.device)
        return nn.functional.mse_loss(net(scheduler.add_noise(batch[0], noise, times), times).sample, noise)

    fit(Task(model, loss), images(), arguments)


def classify(net: Any, batch: Any) -> Any:
    """Return the cross-entropy of a picture classifier."""
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


@case("timm", fix=True)
def efficientnet(arguments: dict[str, Any]) -> None:
    """EfficientNet, whose batch norms are subclasses with an activation."""
    import timm

    fit(Task(timm.create_model("test_efficientnet", num_classes=3), classify), images(32), arguments)


@case("timm")
def vit(arguments: dict[str, Any]) -> None:
    """Vision transformer."""
    import timm

    fit(Task(timm.create_model("test_vit", num_classes=3, img_size=32), classify), images(32), arguments)


@case("segmentation-models-pytorch", fix=True)
def unet(arguments: dict[str, Any]) -> None:
    """U-Net on a ResNet whose batch norms are exchanged."""
    import segmentation_models_pytorch as smp

    model = smp.Unet("resnet18", encoder_weights=None, encoder_depth=3, decoder_channels=(16, 8, 8), classes=1)
    task = Task(model, lambda net, batch: net(batch[0]).square().mean())
    fit(task, images(32), arguments)


@case("timm")
def convnext(arguments: dict[str, Any]) -> None:
    """ConvNeXt with layer scale and depth drop."""
    import timm

    net = timm.create_model("test_convnext", num_classes=3, drop_path_rate=0.1)
    fit(Task(net, classify), images(32), arguments)


@case("timm")
def resnet_groups(arguments: dict[str, Any]) -> None:
    """ResNet with group norm."""
    import timm
    from timm.layers import GroupNorm1

    net = timm.create_model("resnet10t", num_classes=3, norm_layer=GroupNorm1)
    fit(Task(net, classify), images(32, num=32), arguments)


@case("timm")
def mixer(arguments: dict[str, Any]) -> None:
    """MLP-Mixer."""
    from timm.models.mlp_mixer import MlpMixer

    fit(Task(MlpMixer(3, 16, patch_size=4, num_blocks=2, embed_dim=16), classify), images(16), arguments)


@case("torchvision")
def vit_torchvision(arguments: dict[str, Any]) -> None:
    """Vision transformer with dropout."""
    from torchvision.models import VisionTransformer

    net = VisionTransformer(
        image_size=16, patch_size=8, num_layers=2, num_heads=2, hidden_dim=16, mlp_dim=32, dropout=0.1, num_classes=3
    )
    fit(Task(net, classify), images(), arguments)


@case("torchvision")
def convnext_torchvision(arguments: dict[str, Any]) -> None:
    """ConvNeXt with stochastic depth by rows."""
    from torchvision.models.convnext import CNBlockConfig, ConvNeXt

    blocks = [CNBlockConfig(8, 16, 1), CNBlockConfig(16, None, 1)]
    fit(Task(ConvNeXt(blocks, stochastic_depth_prob=0.2, num_classes=3), classify), images(32), arguments)


@case("torchvision")
def swin_torchvision(arguments: dict[str, Any]) -> None:
    """Swin transformer with shifted windows."""
    from torchvision.models import SwinTransformer

    net = SwinTransformer(
        patch_size=[2, 2], embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=[4, 4], num_classes=3
    )
    fit(Task(net, classify), images(), arguments)


@case("torchvision", refused="BatchNorm")
def resnet_torchvision(arguments: dict[str, Any]) -> None:
    """ResNet-18 with batch norm."""
    from torchvision.models import resnet18

    fit(Task(resnet18(num_classes=3), classify), images(32, num=32), arguments)


@case("monai")
def unet_monai(arguments: dict[str, Any]) -> None:
    """Residual U-Net with instance norm, on volumes."""
    from monai.networks.nets import UNet

    net = UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1)
    torch.manual_seed(0)
    data = DataLoader(TensorDataset(torch.randn(32, 1, 8, 8, 8), torch.randint(2, (32, 8, 8, 8))), batch_size=BATCH)
    fit(Task(net, classify), data, arguments)


@case("monai")
def dice(arguments: dict[str, Any]) -> None:
    """U-Net under a Dice loss of each record."""
    from monai.losses import DiceLoss
    from monai.networks.nets import BasicUNet

    criterion = DiceLoss(sigmoid=True)
    net = BasicUNet(2, 1, 1, features=(4, 4, 8, 8, 8, 4))
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 1, 32, 32), torch.randint(2, (32, 1, 32, 32)))
    fit(Task(net, lambda net, batch: criterion(net(batch[0]), batch[1])), DataLoader(data, batch_size=BATCH), arguments)


@case("monai", refused="share a denominator|influence each other")
def dice_of_batch(arguments: dict[str, Any]) -> None:
    """U-Net under a Dice loss over the whole batch."""
    from monai.losses import DiceLoss
    from monai.networks.nets import BasicUNet

    criterion = DiceLoss(sigmoid=True, batch=True)
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(32, 1, 32, 32), torch.randint(2, (32, 1, 32, 32)))
    net = BasicUNet(2, 1, 1, features=(4, 4, 8, 8, 8, 4))
    fit(Task(net, lambda net, batch: criterion(net(batch[0]), batch[1])), DataLoader(data, batch_size=BATCH), arguments)


@case("vit-pytorch")
def compact_transformer(arguments: dict[str, Any]) -> None:
    """Compact convolutional transformer with depth drop."""
    from vit_pytorch.cct import CCT

    net = CCT(
        img_size=(16, 16), embedding_dim=16, n_conv_layers=1, kernel_size=3, stride=2, padding=1, num_layers=2,
        num_heads=2, mlp_ratio=2.0, num_classes=3, positional_embedding="learnable",
    )  # fmt: skip
    fit(Task(net, classify), images(), arguments)


@case("vit-pytorch")
def class_attention(arguments: dict[str, Any]) -> None:
    """CaiT: attention among classes after that among patches, with talking heads."""
    from vit_pytorch.cait import CaiT

    net = CaiT(image_size=16, patch_size=4, num_classes=3, dim=16, depth=2, cls_depth=1, heads=2, mlp_dim=16)
    fit(Task(net, classify), images(), arguments)


@case("diffusers")
def autoencoder_kl(arguments: dict[str, Any]) -> None:
    """Variational autoencoder of latent diffusion."""
    from diffusers import AutoencoderKL

    net = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(8,),
        norm_num_groups=4, latent_channels=2, sample_size=16,
    )  # fmt: skip

    def loss(net: Any, batch: Any) -> Any:
        code = net.encode(batch[0]).latent_dist
        return nn.functional.mse_loss(net.decode(code.sample()).sample, batch[0]) + 1e-3 * code.kl().mean()

    fit(Task(net, loss), images(), arguments)


@case("diffusers")
def diffusion_transformer(arguments: dict[str, Any]) -> None:
    """Diffusion transformer with labels that drop out."""
    from diffusers import DDPMScheduler, DiTTransformer2DModel

    net = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=3, out_channels=3, num_layers=2, sample_size=16,
        patch_size=4, num_embeds_ada_norm=50, norm_num_groups=1,
    )  # fmt: skip
    scheduler = DDPMScheduler(num_train_timesteps=50)

    def loss(net: Any, batch: Any) -> Any:
        noise, times = torch.randn_like(batch[0]), torch.randint(0, 50, (len(batch[0]),))
        noisy = scheduler.add_noise(batch[0], noise, times)
        return nn.functional.mse_loss(net(noisy, timestep=times, class_labels=batch[1]).sample, noise)

    fit(Task(net, loss), images(), arguments)


@case("diffusers")
def unet3d(arguments: dict[str, Any]) -> None:
    """UNet3D over the frames of videos, under a denoising loss with texts."""
    from diffusers import UNet3DConditionModel

    torch.manual_seed(0)
    model = UNet3DConditionModel(
        sample_size=4, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(4, 8), norm_num_groups=2,
        cross_attention_dim=8, attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"), up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"),
    )  # fmt: skip

    def loss(net: Any, batch: Any) -> Any:
        noise = torch.randn_like(batch[0])
        times = torch.randint(0, 50, (len(noise),), device=noise.device)
        return nn.functional.mse_loss(net(batch[0] + noise, times, batch[1]).sample, noise)

    data = TensorDataset(torch.randn(64, 3, 2, 4, 4), torch.randn(64, 4, 8))
    fit(Task(model, loss), DataLoader(data, batch_size=BATCH), arguments)

"""UNETR on the SimCroP encoder: non-cubic patches, any region whose size divides by the patch.

The published network (ToniChopp/SimCroP, downstream segmentation) made of MONAI's UNETR blocks. From a region
``96 x 96 x 48`` with patches ``16 x 16 x 8``: grid ``6 x 6 x 6``, three x2 stages to ``48 x 48 x 48``, then a trilinear
one to the full region, since no further x2 would lead there. Smaller patches take fewer stages, or an axis would grow
beyond the region.
"""

import math
from collections.abc import Sequence

import torch
from custom_components.cpu import convolves_in_float32, instance_norm
from custom_components.errors import InputError
from custom_components.vit import SimCroPEncoder
from monai.networks.blocks import UnetrBasicBlock, UnetResBlock, UnetrPrUpBlock, UnetrUpBlock
from monai.networks.blocks.dynunet_block import UnetOutBlock
from monai.networks.layers import Norm
from torch import Tensor, nn
from torch.nn import functional as F


class InstanceNorm(nn.Module):
    """Instance norm without affine that leaves maps channels last, where torch's own copies them there and back."""

    def __init__(self, num_features: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.num_features = num_features
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``[B, num_features, X, Y, Z]`` -> the same shape."""
        return instance_norm(x, self.eps)


NORM = "instance_channels_last"  # its name in MONAI's blocks
Norm.add_factory_class(NORM, InstanceNorm)


class TrilinearUpBlock(nn.Module):
    """Trilinear upsampling to the size of ``skip``, a biased 3 x 3 x 3 convolution, and a residual unit on both."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv3d(in_channels, out_channels, kernel_size=3, padding=1)
        self.conv_block = UnetResBlock(3, 2 * out_channels, out_channels, 3, 1, norm_name=NORM)

    def forward(self, x: Tensor, skip: Tensor) -> Tensor:
        x = F.interpolate(x, size=skip.shape[2:], mode="trilinear", align_corners=False)
        return self.conv_block(torch.cat([self.conv(x), skip], dim=1))


class SimCroPUNETR(nn.Module):
    """UNETR (Hatamizadeh et al., WACV 2022) whose encoder is SimCroP's, as the authors fine-tune it.

    Skips are the raw outputs of three blocks, or of two or one where patches are below 8 voxels along an axis; the
    bottleneck is the normed output of the last. Residual units, instance norm without affine, LeakyReLU 0.01.

    Args:
        encoder: without class token, so that every parameter gets a gradient; its ``img_size`` is the region.
        out_channels: classes, background included.
        feature_size: channels at full resolution; doubles with each stage down.
        skip_layers: the blocks that skips come from, counted from 1, one for each stage, the finest first; 0 is what
            :meth:`custom_components.vit.SimCroPEncoder.describe` gives, where a patch's tokens are about that patch
            alone. None, as published, for those at a quarter, half and three quarters of the depth: 4, 7 and 10 of 12.

    Raises:
        InputError: the encoder has a class token, which no stage of the UNETR would read; or ``skip_layers`` are not
            one block that there is for each stage.
    """

    def __init__(
        self,
        encoder: SimCroPEncoder,
        out_channels: int,
        feature_size: int = 16,
        skip_layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        if encoder.num_prefix_tokens:
            raise InputError("the UNETR's encoder has a class token that nothing reads: give class_token false")
        self.encoder = encoder
        self.grid = encoder.grid
        depth = len(encoder.blocks)
        hidden, size = encoder.hidden_size, feature_size
        in_channels = encoder.patch_embed.proj.in_channels
        self.encoder1 = UnetrBasicBlock(3, in_channels, size, 3, 1, NORM, res_block=True)
        # x2 stages until the shortest axis of a patch is at the voxels
        stages = max(1, min(3, int(math.log2(min(encoder.patch_size)))))
        published = [depth // 4 + 1, depth // 2 + 1, 3 * depth // 4 + 1][-stages:]
        self.skip_layers = published if skip_layers is None else list(skip_layers)
        if len(self.skip_layers) != stages or not all(0 <= layer <= depth for layer in self.skip_layers):
            raise InputError(
                f"skip_layers {self.skip_layers}: patches of {encoder.patch_size} make {stages} stages, and each takes "
                f"one of 0 to num_layers {depth}: give so many, or null"
            )
        up = dict(kernel_size=3, stride=1, upsample_kernel_size=2, norm_name=NORM, conv_block=True, res_block=True)
        widths = [hidden, *(size << stages - i for i in range(stages))]  # from the token grid up
        absent = [None] * (3 - stages)
        skips = [UnetrPrUpBlock(3, hidden, widths[i + 1], num_layer=i, **up) for i in reversed(range(stages))]
        self.encoder2, self.encoder3, self.encoder4 = absent + skips  # named as in MONAI's UNETR
        ups = [UnetrUpBlock(3, widths[i], widths[i + 1], 3, 2, NORM, res_block=True) for i in range(stages)]
        self.decoder5, self.decoder4, self.decoder3 = ups + absent
        self.decoder2 = TrilinearUpBlock(2 * size, size)
        self.out = UnetOutBlock(3, size, out_channels)
        self.to(memory_format=torch.channels_last_3d)  # the layout in which 3D convolutions are fastest

    def feature_map(self, tokens: Tensor) -> Tensor:
        """Tokens ``[B, N, C]``, last axis of the grid fastest -> ``[B, C, gx, gy, gz]``, a view, channels last."""
        gx, gy, gz = self.grid
        return tokens.reshape(tokens.shape[0], gx, gy, gz, tokens.shape[2]).permute(0, 4, 1, 2, 3)

    def decode(self, volume: Tensor, tokens: Tensor, skips: list[Tensor]) -> Tensor:
        """Logits from the encoder's last tokens, and those of ``skip_layers``."""
        x = self.decoder5(self.feature_map(tokens), self.encoder4(self.feature_map(skips[-1])))
        if self.decoder4 is not None:
            x = self.decoder4(x, self.encoder3(self.feature_map(skips[-2])))
        if self.decoder3 is not None:
            x = self.decoder3(x, self.encoder2(self.feature_map(skips[-3])))
        return self.out(self.decoder2(x, self.encoder1(volume)))

    def forward(self, volume: Tensor) -> Tensor:
        """``[B, in_channels, X, Y, Z]``, HU scaled to [-1, 1] -> logits ``[B, out_channels, X, Y, Z]``."""
        described = self.encoder.describe(volume)
        tokens, hidden_states = self.encoder.transform(self.encoder.embed(volume, None, described))
        layers = [described] + hidden_states
        skips = [layers[layer] for layer in self.skip_layers]
        if not torch.jit.is_scripting():
            if convolves_in_float32(volume.device):
                with torch.autocast("cpu", enabled=False):
                    return self.decode(volume.float(), tokens.float(), [skip.float() for skip in skips])
        return self.decode(volume, tokens, skips)

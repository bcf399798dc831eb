"""The 3D vision transformer that all three bundles share, in the order in which a voxel meets it.

Parameter names and tensor layouts are those of timm's ``VisionTransformer``, which the published checkpoints use
(``blocks.N.attn.qkv.weight``, ``patch_embed.proj.weight`` ...), so weights travel without renaming.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from custom_components.cpu import attention
from custom_components.errors import InputError


def patch_grid(img_size: Sequence[int], patch_size: Sequence[int]) -> tuple[int, int, int]:
    """Number of patches along each axis.

    Raises:
        InputError: an axis of ``img_size`` does not divide by the patch.
    """
    axes = list(zip(img_size, patch_size, strict=True))
    if any(size < patch or size % patch for size, patch in axes):
        raise InputError(
            f"img_size {tuple(img_size)} is not divisible by patch_size {tuple(patch_size)}: "
            "change one of the two keys so that every axis divides"
        )
    return tuple(size // patch for size, patch in axes)


def patchify(volume: Tensor, patch_size: tuple[int, int, int]) -> Tensor:
    """``[B, C, X, Y, Z]`` -> ``[B, N, C * px * py * pz]``, patches and voxels both with the last axis fastest.

    A linear layer on the result is a strided 3D convolution, flattened and transposed, as in published checkpoints.
    """
    px, py, pz = patch_size
    b, c, x, y, z = volume.shape
    gx, gy, gz = x // px, y // py, z // pz
    patches = volume.reshape(b, c, gx, px, gy, py, gz, pz)
    patches = patches.permute(0, 2, 4, 6, 1, 3, 5, 7)  # b gx gy gz c px py pz
    return patches.reshape(b, gx * gy * gz, c * px * py * pz)


def unpatchify(patches: Tensor, grid: tuple[int, int, int], patch_size: tuple[int, int, int]) -> Tensor:
    """The inverse of :func:`patchify`: ``[B, N, C * px * py * pz]`` -> ``[B, C, X, Y, Z]``."""
    px, py, pz = patch_size
    gx, gy, gz = grid
    b, c = patches.shape[0], patches.shape[2] // (px * py * pz)
    volume = patches.reshape(b, gx, gy, gz, c, px, py, pz)
    volume = volume.permute(0, 4, 1, 5, 2, 6, 3, 7)  # b c gx px gy py gz pz
    return volume.reshape(b, c, gx * px, gy * py, gz * pz)


def gather_tokens(tokens: Tensor, index: Tensor) -> Tensor:
    """``tokens [B, N, C]`` at ``index [B, n]`` (int64) -> ``[B, n, C]``."""
    return tokens.gather(1, index.unsqueeze(-1).expand(-1, -1, tokens.shape[-1]))


def sincos3d_positions(grid: Sequence[int], hidden_size: int) -> Tensor:
    """Fixed positions ``[N, hidden_size]`` that encode all three axes.

    Per axis sin then cos with f_i = 10000^(-i / n), n = hidden_size // 6, axes in the volume's own order: the corrected
    table of the authors' follow-up (ToniChopp/ASAP). Channels that six does not divide stay zero.
    """
    n = hidden_size // 6
    frequency = 10000.0 ** (-torch.arange(n, dtype=torch.float64) / n)
    axes = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    angles = [axis.flatten()[:, None] * frequency for axis in axes]
    table = torch.cat([wave for angle in angles for wave in (angle.sin(), angle.cos())], dim=1)
    return F.pad(table, (0, hidden_size - table.shape[1])).float()


def simcrop_positions(grid: Sequence[int], hidden_size: int) -> Tensor:
    """The published SimCroP table ``[N, hidden_size]``: even channels sin(h f), odd channels cos(w f), depth invisible.

    f_i = 10000^(-2i / hidden_size). Only for weights that were trained with it; see ``sincos3d_positions`` for our own.
    """
    frequency = 10000.0 ** (-2 * torch.arange(hidden_size // 2, dtype=torch.float64) / hidden_size)
    h, w, _ = torch.meshgrid(*(torch.arange(size, dtype=torch.float64) for size in grid), indexing="ij")
    waves = torch.stack([(h.flatten()[:, None] * frequency).sin(), (w.flatten()[:, None] * frequency).cos()], dim=-1)
    return waves.flatten(1).float()


POSITIONS = {"sincos3d": sincos3d_positions, "simcrop": simcrop_positions}


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier-uniform weights and zero biases for every linear layer (``module.apply``)."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def hu_statistics(patches: Tensor, num_bins: int) -> Tensor:
    """Intensity statistics of patches ``[B, n, voxels]`` in [-1, 1] -> ``[B, n, num_bins + 4]``.

    Roots of the histogram's shares (so that a lesion of few voxels counts), mean, standard deviation, minimum, maximum.
    """
    index = ((patches + 1) * (num_bins / 2)).long().clamp(0, num_bins - 1)
    histogram = torch.zeros(patches.shape[0], patches.shape[1], num_bins, dtype=patches.dtype, device=patches.device)
    histogram = histogram.scatter_add(2, index, torch.full_like(patches, 1.0 / patches.shape[2])).sqrt()
    moments = [patches.mean(2), patches.std(2), patches.amin(2), patches.amax(2)]
    return torch.cat([histogram, torch.stack(moments, dim=-1)], dim=-1)


class PatchEmbed(nn.Module):
    """One linear layer on flattened patches, and a second one on their intensity statistics if ``hu_bins`` is not 0.

    The weight has the shape of a 3D convolution's, since published checkpoints store it so; it is applied as a matrix
    product, because only kept patches are embedded and a convolution's bf16 backward is slow on CPUs.
    """

    def __init__(self, in_channels: int, patch_size: Sequence[int], hidden_size: int, hu_bins: int = 0) -> None:
        super().__init__()
        self.hu_bins = hu_bins
        self.proj = nn.Conv3d(in_channels, hidden_size, tuple(patch_size), tuple(patch_size))
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)
        self.statistics = nn.Linear(hu_bins + 4, hidden_size, bias=False) if hu_bins else None

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, n, C * px * py * pz]`` -> ``[B, n, hidden_size]``."""
        tokens = F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)
        if self.statistics is not None:
            tokens = tokens + self.statistics(hu_statistics(patches, self.hu_bins))
        return tokens


class Attention(nn.Module):
    """Multi-head self-attention with a fused qkv projection."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        if hidden_size % num_heads:
            raise InputError(
                f"hidden_size {hidden_size} is not divisible by num_heads {num_heads}: change one of the two"
            )
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size)
        self.proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """``[B, N, C]`` -> ``[B, N - first, C]``: what the tokens from ``first`` on gather from all."""
        b, n, c = x.shape
        if first == 0:
            q, kv = self.qkv(x).split([c, 2 * c], dim=-1)
        else:
            q = F.linear(x[:, first:], self.qkv.weight[:c], self.qkv.bias[:c])
            kv = F.linear(x, self.qkv.weight[c:], self.qkv.bias[c:])
        q = q.reshape(b, n - first, self.num_heads, -1).transpose(1, 2)  # b heads n channels
        kv = kv.reshape(b, n, 2, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        x = attention(q, kv[0], kv[1])
        return self.proj(x.transpose(1, 2).reshape(b, n - first, c))


class MLP(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, hidden_size: int, mlp_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_dim)
        self.fc2 = nn.Linear(mlp_dim, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block, LayerNorm eps 1e-6, no dropout."""

    def __init__(self, hidden_size: int, mlp_dim: int, num_heads: int, use_checkpoint: bool = False) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.norm1 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.attn = Attention(hidden_size, num_heads)
        self.norm2 = nn.LayerNorm(hidden_size, eps=1e-6)
        self.mlp = MLP(hidden_size, mlp_dim)

    def forward(self, x: Tensor, first: int = 0) -> Tensor:
        """``[B, N, C]`` -> ``[B, N - first, C]``, the block's output for the tokens from ``first`` on."""
        if self.use_checkpoint and not torch.jit.is_scripting() and torch.is_grad_enabled():
            return checkpoint(self.compute, x, first, use_reentrant=False)
        return self.compute(x, first)

    def compute(self, x: Tensor, first: int) -> Tensor:
        x = x[:, first:] + self.attn(self.norm1(x), first)
        return x + self.mlp(self.norm2(x))


def compile_blocks(network: nn.Module, enabled: bool = True) -> nn.Module:
    """``torch.compile`` for each transformer block of a network, at its first use; returns the network."""
    for module in network.modules():
        if enabled and isinstance(module, Block):
            module.compile()
    return network


class SimCroPEncoder(nn.Module):
    """3D ViT encoder of SimCroP (MICCAI 2025): ViT-B on 16 x 16 x 8 patches with these defaults.

    Args:
        in_channels: channels of the volume; 1 for CT.
        img_size, patch_size: voxels along each axis of the volume and of a patch, which need not be a cube.
        hidden_size, mlp_dim: channels of a token, and inside a block's MLP.
        num_layers, num_heads: transformer blocks, and attention heads in each, which divide ``hidden_size``.
        class_token: prepend a trainable class token.
        pos_embed: fixed positions, ``sincos3d`` or ``simcrop`` (the authors', blind to depth); stored with the weights,
            since an imported checkpoint brings its own.
        hu_bins: bins of a histogram per patch that is embedded beside its voxels; 0, as published, for none. A small
            network then need not learn what a nodule's or a calcification's HU are. For one channel.
        use_checkpoint: compute every block again in the backward pass instead of keeping its activations: less memory,
            more time, the same numbers.

    Raises:
        InputError: ``img_size`` or ``hidden_size`` does not divide, or ``pos_embed`` is unknown.
    """

    def __init__(
        self,
        in_channels: int = 1,
        img_size: Sequence[int] = (224, 224, 112),
        patch_size: Sequence[int] = (16, 16, 8),
        hidden_size: int = 768,
        mlp_dim: int = 3072,
        num_layers: int = 12,
        num_heads: int = 12,
        class_token: bool = True,
        pos_embed: str = "sincos3d",
        hu_bins: int = 0,
        use_checkpoint: bool = False,
    ) -> None:
        super().__init__()
        if pos_embed not in POSITIONS:
            raise InputError(f"pos_embed {pos_embed!r} is unknown: choose one of {sorted(POSITIONS)}")
        self.grid = patch_grid(img_size, patch_size)
        self.patch_size = (patch_size[0], patch_size[1], patch_size[2])
        self.num_patches = self.grid[0] * self.grid[1] * self.grid[2]
        self.hidden_size = hidden_size
        self.num_prefix_tokens = int(class_token)

        self.patch_embed = PatchEmbed(in_channels, patch_size, hidden_size, hu_bins)
        self.cls_token = (
            nn.Parameter(nn.init.normal_(torch.empty(1, 1, hidden_size), std=0.02)) if class_token else None
        )
        positions = POSITIONS[pos_embed](self.grid, hidden_size)
        self.register_buffer("pos_embed", F.pad(positions, (0, 0, self.num_prefix_tokens, 0))[None])
        self.blocks = nn.ModuleList(Block(hidden_size, mlp_dim, num_heads, use_checkpoint) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.blocks.apply(init_weights)

    def embed(self, volume: Tensor, keep: Tensor | None = None) -> Tensor:
        """Tokens before the first block, positions added: ``[B, 1 + n, C]``, class token first."""
        patches = patchify(volume, self.patch_size)
        positions = self.pos_embed[:, self.num_prefix_tokens :]
        if keep is not None:
            patches = gather_tokens(patches, keep)
            positions = gather_tokens(positions.expand(volume.shape[0], -1, -1), keep)
        tokens = self.patch_embed(patches) + positions
        if self.cls_token is not None:
            prefix = (self.cls_token + self.pos_embed[:, :1]).expand(volume.shape[0], -1, -1)
            tokens = torch.cat([prefix.to(tokens.dtype), tokens], dim=1)
        return tokens

    def transform(self, tokens: Tensor) -> tuple[Tensor, list[Tensor]]:
        """All blocks and the final norm on embedded tokens; returns what :meth:`forward` does."""
        hidden_states: list[Tensor] = []
        for block in self.blocks:
            tokens = block(tokens)
            hidden_states.append(tokens)
        return self.norm(tokens), hidden_states

    def forward(self, volume: Tensor, keep: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Encode a volume, or only some of its patches.

        Args:
            volume: ``[B, in_channels, X, Y, Z]`` float, X, Y, Z as in ``img_size``, HU scaled to [-1, 1].
            keep: ``[B, n]`` int64, indices of the patches to encode, the last axis of the grid fastest; all when None.

        Returns:
            ``tokens [B, 1 + n, C]`` after the final norm, class token first (if there is one), then the patches in the
            order of ``keep``; and ``hidden_states``, where item i is the output of block i + 1 before that norm.
        """
        return self.transform(self.embed(volume, keep))


def upsample_patches(values: Tensor, grid: Sequence[int], img_size: Sequence[int]) -> Tensor:
    """One value per patch ``[..., N]`` -> a smooth map ``[..., X, Y, Z]``, patch centres keeping their values."""
    maps = F.interpolate(values.float().reshape(1, -1, *grid), tuple(img_size), mode="trilinear", align_corners=False)
    return maps.reshape(*values.shape[:-1], *img_size)

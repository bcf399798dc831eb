"""The 3D vision transformer that all three bundles share, in the order in which a voxel meets it.

Parameter names and tensor layouts are those of timm's ``VisionTransformer``, which the published checkpoints use
(``blocks.N.attn.qkv.weight``, ``patch_embed.proj.weight`` ...), so weights travel without renaming.
"""

from collections.abc import Sequence

import torch
from custom_components.cpu import attention
from custom_components.distributed import gather_rows
from custom_components.errors import InputError
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint


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
    index = ((patches + 1) * (num_bins / 2)).clamp_(0, num_bins - 1).long()
    histogram = torch.zeros(patches.shape[0], patches.shape[1], num_bins, dtype=patches.dtype, device=patches.device)
    histogram = histogram.scatter_add(2, index, torch.ones_like(patches)).div_(patches.shape[2]).sqrt_()
    mean = patches.mean(2)
    # from the sums: torch's own standard deviation takes half of the time of all statistics
    variance = (patches.square().mean(2) - mean.square()).clamp_(min=0) * (patches.shape[2] / (patches.shape[2] - 1))
    moments = [mean, variance.sqrt(), patches.amin(2), patches.amax(2)]
    return torch.cat([histogram, torch.stack(moments, dim=-1)], dim=-1)


class ScaleSpace(nn.Module):
    """How strongly each patch holds something brighter or darker than what surrounds it, of several sizes.

    Differences of Gaussians (Lindeberg, IJCV 1998), sampled about every two of the smallest widths; of each, the
    patch's maximum and minimum. A Gaussian reaches into neighbouring patches, masked ones included. Voxels count as
    ``ceiling`` at most.

    Args:
        sigmas: widths in mm, ascending; each of them minus the next one's, the last one's minus 1.6 times itself.
        pixdim: mm per voxel along each axis.
    """

    def __init__(
        self, sigmas: Sequence[float], pixdim: Sequence[float], grid: tuple[int, int, int], patch_size: Sequence[int]
    ) -> None:
        super().__init__()
        if list(sigmas) != sorted(sigmas) or min(sigmas) <= 0:
            raise InputError(f"scale_space {list(sigmas)}: give widths of Gaussians in mm, ascending, above 0")
        self.samples = [max(1, round(p * mm / (2 * sigmas[0]))) for p, mm in zip(patch_size, pixdim, strict=True)]
        self.ceiling = 0.15
        widths = [*sigmas, 1.6 * sigmas[-1]]
        for axis, name in enumerate("xyz"):
            size, number = grid[axis] * patch_size[axis], grid[axis] * self.samples[axis]
            voxel = torch.arange(size, dtype=torch.float64)
            centre = (torch.arange(number, dtype=torch.float64) + 0.5) * (size / number) - 0.5
            distance = (centre[:, None] - voxel) * pixdim[axis]
            weight = torch.stack([torch.exp(-0.5 * (distance / width) ** 2) for width in widths])
            weight = weight / weight.sum(-1, keepdim=True)  # at the border, of what is there
            self.register_buffer(name, weight.float(), persistent=False)

    def forward(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> ``[B, N, 2 * len(sigmas)]``."""
        v = volume[:, 0].clamp(max=self.ceiling)  # bone would hide what lies beside it
        scales, gx = self.x.shape[0], self.x.shape[1]
        smooth = (self.x.flatten(0, 1) @ v.flatten(2)).view(v.shape[0], scales, gx, v.shape[2], v.shape[3])
        # one matrix product a scale: broadcast ones are many small ones
        narrow = [(smooth[:, s] @ self.z[s].T).transpose(2, 3) @ self.y[s].T for s in range(scales)]
        smooth = torch.stack(narrow, dim=1).transpose(3, 4)
        difference = smooth[:, :-1] - smooth[:, 1:]
        extremes = [F.max_pool3d(difference, self.samples), -F.max_pool3d(-difference, self.samples)]
        return torch.cat(extremes, dim=1).flatten(2).transpose(1, 2)


class Standardize(nn.Module):
    """Features of patches to mean 0 and standard deviation 1, as they are in the first batch that it trains on.

    Fixed from then on, and stored with the weights; until then, features pass as they are.
    """

    smallest = 0.015  # a bin of the histogram that hardly a voxel falls into is not blown up any further

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))
        self.register_buffer("fitted", torch.tensor(False))
        self.asked = False  # reading a tensor waits for the device: once, not at every step

    def forward(self, x: Tensor) -> Tensor:
        """``[B, N, F]`` -> ``[B, N, F]``."""
        if not torch.jit.is_scripting():
            if self.training and not self.asked:
                self.asked = True
                if not self.fitted:
                    self.fit(x)
        return (x - self.mean) / self.std

    @torch.jit.unused
    def fit(self, x: Tensor) -> None:
        x = x.double()
        moments = torch.stack([x.mean((0, 1)), x.square().mean((0, 1))])
        mean, square = torch.stack(gather_rows(moments[None])).mean((0, 1))  # of all processes
        self.mean.copy_(mean)
        self.std.copy_((square - mean.square()).clamp(min=0).sqrt().clamp(min=self.smallest))
        self.fitted.fill_(True)


class PatchStatistics(nn.Module):
    """What no small network learns in minutes to see in raw voxels: HU statistics of each patch, and its scale space.

    Args:
        hu_bins: bins of the HU histogram, see :func:`hu_statistics`; 0 for no HU statistics.
        scale_space: widths in mm, see :class:`ScaleSpace`; empty for none.
    """

    def __init__(
        self,
        hu_bins: int,
        scale_space: Sequence[float],
        pixdim: Sequence[float],
        grid: tuple[int, int, int],
        patch_size: tuple[int, int, int],
    ) -> None:
        super().__init__()
        self.hu_bins = hu_bins
        self.patch_size = patch_size
        self.scale_space = ScaleSpace(scale_space, pixdim, grid, patch_size) if scale_space else None
        self.num_features = (hu_bins + 4 if hu_bins else 0) + 2 * len(scale_space)

    def forward(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> ``[B, N, num_features]`` float32."""
        if not torch.jit.is_scripting():
            with torch.no_grad(), torch.autocast(volume.device.type, enabled=False):
                return self.compute(volume.float())
        return self.compute(volume.float())

    def compute(self, volumes: Tensor) -> Tensor:
        # on a CPU volume by volume, which its caches hold: the same numbers in half of the time
        at_once = 1 if volumes.device.type == "cpu" else len(volumes)
        computed: list[Tensor] = []
        for volume in volumes.split(at_once):
            statistics: list[Tensor] = []
            if self.hu_bins:
                statistics.append(hu_statistics(patchify(volume, self.patch_size), self.hu_bins))
            if self.scale_space is not None:
                statistics.append(self.scale_space(volume))
            computed.append(torch.cat(statistics, dim=-1))
        return torch.cat(computed)


class PatchEmbed(nn.Module):
    """One linear layer on flattened patches.

    The weight has the shape of a 3D convolution's, since published checkpoints store it so; it is applied as a matrix
    product, because only kept patches are embedded and a convolution's bf16 backward is slow on CPUs.
    """

    def __init__(self, in_channels: int, patch_size: Sequence[int], hidden_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv3d(in_channels, hidden_size, tuple(patch_size), tuple(patch_size))
        nn.init.xavier_uniform_(self.proj.weight.view(hidden_size, -1))
        nn.init.zeros_(self.proj.bias)

    def forward(self, patches: Tensor) -> Tensor:
        """``[B, n, C * px * py * pz]`` -> ``[B, n, hidden_size]``."""
        return F.linear(patches, self.proj.weight.flatten(1), self.proj.bias)


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


class StatisticsEmbed(nn.Module):
    """Statistics of each patch, and its place, as tokens: standardised, a linear layer, positions, a residual MLP.

    Voxels are kept out on purpose: they join after the alignment has read these tokens (``align_layer`` 0).
    """

    def __init__(self, statistics: PatchStatistics, hidden_size: int, mlp_dim: int) -> None:
        super().__init__()
        self.statistics = statistics
        self.standardize = Standardize(statistics.num_features)
        self.proj = nn.Linear(statistics.num_features, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6) if mlp_dim else None
        self.mlp = MLP(hidden_size, mlp_dim) if mlp_dim else None
        self.apply(init_weights)

    def measure(self, volume: Tensor) -> Tensor:
        """``[B, 1, X, Y, Z]`` in [-1, 1] -> standardised statistics ``[B, N, F]`` of all patches."""
        return self.standardize(self.statistics(volume))

    def forward(self, statistics: Tensor, positions: Tensor) -> Tensor:
        """Statistics ``[B, n, F]`` and positions ``[B, n, C]`` of some patches -> ``[B, n, C]``."""
        tokens = self.proj(statistics) + positions
        if self.norm is not None and self.mlp is not None:
            tokens = tokens + self.mlp(self.norm(tokens))
        return tokens


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
        hu_bins, scale_space: the :class:`PatchStatistics` that are embedded beside the voxels; 0 and empty, as
            published, for none. For one channel.
        pixdim: mm per voxel, which a scale space needs.
        statistics_mlp_dim: channels of a residual MLP between the statistics' linear layer and the first block; 0 for
            none. It sees one patch and its place, and combines them before the blocks mix patches.
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
        scale_space: Sequence[float] = (),
        pixdim: Sequence[float] = (1.5, 1.5, 3.0),
        statistics_mlp_dim: int = 0,
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

        self.patch_embed = PatchEmbed(in_channels, patch_size, hidden_size)
        self.statistics = (
            StatisticsEmbed(
                PatchStatistics(hu_bins, scale_space, pixdim, self.grid, self.patch_size),
                hidden_size,
                statistics_mlp_dim,
            )
            if hu_bins or scale_space
            else None
        )
        self.cls_token = (
            nn.Parameter(nn.init.normal_(torch.empty(1, 1, hidden_size), std=0.02)) if class_token else None
        )
        positions = POSITIONS[pos_embed](self.grid, hidden_size)
        self.register_buffer("pos_embed", F.pad(positions, (0, 0, self.num_prefix_tokens, 0))[None])
        self.blocks = nn.ModuleList(Block(hidden_size, mlp_dim, num_heads, use_checkpoint) for _ in range(num_layers))
        self.norm = nn.LayerNorm(hidden_size, eps=1e-6)
        self.blocks.apply(init_weights)

    def measure(self, volume: Tensor) -> Tensor:
        """What :meth:`describe` embeds of every patch, ``[B, N, F]``: statistics where there are some, else voxels."""
        return patchify(volume, self.patch_size) if self.statistics is None else self.statistics.measure(volume)

    def describe(self, volume: Tensor, keep: Tensor | None = None, measured: Tensor | None = None) -> Tensor:
        """What is known of each patch alone, and its place: ``[B, n, C]``, of the patches ``keep [B, n]`` or of all.

        ``measured`` is what :meth:`measure` gives for the volume, if that is known already.
        """
        found = self.measure(volume) if measured is None else measured
        positions = self.pos_embed[:, self.num_prefix_tokens :].expand(volume.shape[0], -1, -1)
        if keep is not None:
            found, positions = gather_tokens(found, keep), gather_tokens(positions, keep)
        return self.patch_embed(found) + positions if self.statistics is None else self.statistics(found, positions)

    def embed(self, volume: Tensor, keep: Tensor | None = None, described: Tensor | None = None) -> Tensor:
        """Tokens before the first block, positions added: ``[B, 1 + n, C]``, class token first.

        ``described`` is what :meth:`describe` gives for the same patches, if that is known already.
        """
        tokens = self.describe(volume, keep) if described is None else described
        if self.statistics is not None:
            patches = patchify(volume, self.patch_size)
            tokens = tokens + self.patch_embed(patches if keep is None else gather_tokens(patches, keep))
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

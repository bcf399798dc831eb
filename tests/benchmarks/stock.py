"""The published architecture of stock parts of torch and transformers, as the peer of our own code in the benchmarks.

What costs time in the published code is kept (see ``bundles/pretrain/docs/published.md``): a convolution embeds all
patches, masked ones too; the text encoder reads 512 tokens twice, with dropout and a vocabulary head that nothing
reads; the report's loss covers all 512 positions. Nothing of the authors' code is in here.
"""

from __future__ import annotations

import torch
from custom_components.losses import SimCroPLoss
from custom_components.simcrop import Aligner, ReportDecoder
from custom_components.vit import patchify
from torch import Tensor, nn
from transformers import BertForMaskedLM

LENGTH = 512  # tokens of every report


def blocks(layers: int, width: int, heads: int, mlp: int) -> nn.Sequential:
    """Pre-norm blocks whose attention is ``scaled_dot_product_attention``, as in timm."""
    options = {"dropout": 0.0, "activation": "gelu", "layer_norm_eps": 1e-6, "batch_first": True, "norm_first": True}
    layer = [nn.TransformerEncoderLayer(width, heads, mlp, **options) for _ in range(layers)]
    return nn.Sequential(*layer, nn.LayerNorm(width, eps=1e-6))


class StockEncoder(nn.Module):
    """ViT-B of published size, on 224 x 224 x 112 voxels."""

    def __init__(self) -> None:
        super().__init__()
        self.num_patches = 14**3
        self.proj = nn.Conv3d(1, 768, (16, 16, 8), (16, 16, 8))
        self.cls_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.register_buffer("pos_embed", torch.randn(1, self.num_patches, 768))
        self.blocks = blocks(12, 768, 12, 3072)

    def forward(self, volume: Tensor, keep: Tensor | None = None) -> Tensor:
        """``[B, 1, X, Y, Z]`` -> ``[B, 1 + n, 768]``, of the patches ``keep [B, n]`` or of all."""
        x = self.proj(volume).flatten(2).transpose(1, 2) + self.pos_embed
        if keep is not None:
            x = x.gather(1, keep[..., None].expand(-1, -1, x.shape[2]))
        return self.blocks(torch.cat([self.cls_token.expand(len(x), -1, -1).to(x.dtype), x], dim=1))


class StockSimCroP(nn.Module):
    """A whole pre-training step up to its loss: masked modelling, alignment, report."""

    def __init__(self, text_encoder: str, loss: SimCroPLoss) -> None:
        super().__init__()
        self.encoder = StockEncoder()
        self.num_masked = round(self.encoder.num_patches * 0.75)
        self.embed = nn.Linear(768, 768)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, 768))
        self.decoder = blocks(4, 768, 16, 3072)
        self.pred = nn.Linear(768, 16 * 16 * 8)
        self.text_encoder = BertForMaskedLM.from_pretrained(text_encoder).requires_grad_(False)
        self.aligner = Aligner(768, 768)
        config = self.text_encoder.config
        self.report_decoder = ReportDecoder(768, 768, config.vocab_size, config.pad_token_id)
        self.loss = loss

    def forward(self, volume: Tensor, findings: Tensor, sentence: Tensor, hashes: Tensor, report: Tensor) -> Tensor:
        """The loss of ``volume [B, 1, X, Y, Z]`` and of tokens, with the sentence of each, ``[B, 512]``."""
        order = torch.rand(len(volume), self.encoder.num_patches, device=volume.device).argsort(dim=1)
        masked, keep = order[:, : self.num_masked], order[:, self.num_masked :]
        tokens = self.encoder(volume, keep)
        x = self.embed(tokens)
        hidden = self.mask_token.to(x.dtype).expand(len(x), self.num_masked, -1)
        # back to the order of the volume, since the decoder's positions are those of all patches
        place = order.argsort(dim=1)[..., None].expand(-1, -1, x.shape[2])
        restored = torch.cat([x[:, 1:], hidden], dim=1).roll(self.num_masked, 1).gather(1, place)
        restored = restored + self.encoder.pos_embed
        decoded = self.pred(self.decoder(torch.cat([x[:, :1], restored], dim=1)))[:, 1:]
        at = masked[..., None].expand(-1, -1, decoded.shape[2])
        features, words = (
            self.text_encoder(ids, output_hidden_states=True).hidden_states[-1] for ids in (findings, report)
        )
        everywhere, nowhere = torch.ones_like(report, dtype=torch.bool), torch.zeros_like(report, dtype=torch.bool)
        logits = self.report_decoder(words, tokens[:, 1:], nowhere, everywhere)
        return self.loss(
            {
                "volume_pred": decoded.gather(1, at),
                "volume_target": patchify(volume, self.encoder.proj.kernel_size).gather(1, at),
                "patch_features": self.aligner.patches(tokens[:, 1:], tokens, []),
                "sentence_features": self.aligner.sentences(features, sentence, hashes.shape[1]),
                "sentence_hash": hashes,
                "report_logits": logits,
                "report_target": report.flatten(),
            }
        )

"""The evaluation's arithmetic against plain loops; the whole of it runs in ``tests/bundles/test_pretrain.py``."""

from __future__ import annotations

import pytest
import torch
from custom_components.evaluation.cells import aligned_patches
from custom_components.evaluation.controls import hu_histogram, untrained
from custom_components.evaluation.pretrain import predict_blanked
from custom_components.simcrop import Aligner, SimCroP, VolumeDecoder, VolumeEmbedder
from custom_components.vit import SimCroPEncoder, unpatchify
from monai.data import MetaTensor


def test_hu_histogram_counts_shares():
    image = MetaTensor(torch.tensor([-1.0, -0.99, 0.01, 1.0]).reshape(1, 2, 2, 1))
    histogram = hu_histogram(image)
    assert histogram[0] == 0.5 and histogram[32] == 0.25 and histogram[63] == 0.25


def test_untrained_leaves_the_trained_network_alone(network):
    model = network()
    trained = VolumeEmbedder(model.encoder, model.aligner)
    before = {name: value.clone() for name, value in trained.state_dict().items()}
    other = untrained(trained).state_dict()
    for name, value in trained.state_dict().items():
        assert torch.equal(value, before[name])
    assert not torch.equal(other["encoder.blocks.0.attn.qkv.weight"], before["encoder.blocks.0.attn.qkv.weight"])
    assert not torch.equal(other["encoder.cls_token"], before["encoder.cls_token"])


def small_network(**keys):
    """32 patches of 4 x 4 x 2 voxels, with an instance level."""
    torch.manual_seed(0)
    sizes = {"img_size": (16, 8, 8), "patch_size": (4, 4, 2), "hidden_size": 24, "mlp_dim": 32}
    encoder = SimCroPEncoder(**sizes, num_layers=2, num_heads=3, **keys)
    aligner = Aligner(24, 24, projection_size=16, align_layer=0, patch_projection="linear")
    return SimCroP(encoder, None, VolumeDecoder(encoder, hidden_size=18, num_layers=1, num_heads=3), aligner)


STATISTICS = {"hu_bins": 4, "scale_space": [8.0, 14.0], "pixdim": (4.0, 4.0, 8.0), "statistics_mlp_dim": 48}


def test_untrained_draws_every_matrix_anew():
    model = small_network(**STATISTICS)
    trained = VolumeEmbedder(model.encoder, model.aligner)
    before, after = dict(trained.named_parameters()), dict(untrained(trained).named_parameters())
    matrices = [name for name, value in before.items() if value.squeeze().ndim > 1]
    assert {"encoder.statistics.mlp.fc1.weight", "aligner.patch_projection.1.weight"} < set(matrices)
    assert not [name for name in matrices if torch.equal(before[name], after[name])]


def test_untrained_forgets_what_training_gave_the_rest():
    model = small_network(**STATISTICS)
    trained = VolumeEmbedder(model.encoder, model.aligner)
    with torch.no_grad():
        for value in trained.parameters():
            value.fill_(7.0)
    assert not [name for name, value in untrained(trained).named_parameters() if (value == 7.0).any()]


def test_blanked_hidden_voxels_cannot_leak_through_the_scale_space():
    generator = torch.Generator().manual_seed(0)
    volume = torch.rand(2, 1, 16, 8, 8, generator=generator) - 0.9
    fill = torch.full((32, 32), -0.5)
    for keys, leaks in ((STATISTICS, True), ({"hu_bins": 4}, False), ({}, False)):
        network = small_network(**keys).eval()
        keep, masked = network.draw_masks(volume)
        brighter = torch.zeros(2, 32, 1).scatter_(1, masked[..., None], 0.5).expand(-1, -1, 32)
        other = volume + unpatchify(brighter, network.encoder.grid, (4, 4, 2))  # where it is hidden
        with torch.no_grad():
            seen = [network.volume_decoder(network.encoder(v, keep)[0], keep, masked) for v in (volume, other)]
            blanked = [predict_blanked(network, v, masked, fill) for v in (volume, other)]
        assert torch.allclose(*seen, atol=1e-6) != leaks
        torch.testing.assert_close(*blanked)
        if not leaks:
            torch.testing.assert_close(seen[0], blanked[0])


@pytest.mark.parametrize("align_layer", [0, 1, None])
def test_patches_are_those_that_the_alignment_read(align_layer):
    torch.manual_seed(0)
    encoder = small_network(**STATISTICS).encoder
    embedder = VolumeEmbedder(encoder, Aligner(24, 24, projection_size=16, align_layer=align_layer)).eval()
    volume = torch.rand(2, 1, 16, 8, 8) - 0.9
    with torch.no_grad():
        expected = embedder.patches_and_embedding(volume)[0]
        found = aligned_patches(embedder, volume)
    torch.testing.assert_close(found, expected / expected.norm(dim=-1, keepdim=True))

"""The embedded model's autoencoder: its linear algebra, its previews, its tiles."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from perco_engine.models import autoencoder
from perco_engine.models.autoencoder import PatchAutoencoder


@pytest.fixture
def smooth() -> torch.Tensor:
    """Smooth random pictures (4, 3, 64, 96) in -1..1: their patches lie near a space of few dimensions."""
    torch.manual_seed(0)
    return F.interpolate(torch.randn(4, 3, 16, 24), scale_factor=4, mode="bicubic").clamp(-3, 3) / 3


def patches(pictures: torch.Tensor) -> torch.Tensor:
    return F.unfold(pictures, 8, stride=8).transpose(1, 2).reshape(-1, 3, 8, 8)


@torch.no_grad()
def test_the_linear_maps_alone_are_a_codec(smooth: torch.Tensor) -> None:
    vae = PatchAutoencoder(latent_channels=12, width=20, depth=1)
    deviation = vae.fit_analysis(patches(smooth))
    latents = vae.encode(smooth).latents
    assert latents.shape == (4, 12, 8, 12)
    torch.testing.assert_close(latents.std((0, 2, 3), correction=0), torch.ones(12), rtol=0.01, atol=0.01)
    assert (deviation.diff() <= 0).all()
    independent = torch.pca_lowrank(patches(smooth).flatten(1), 12, niter=20)[1] / len(patches(smooth)) ** 0.5
    torch.testing.assert_close(deviation, independent, rtol=0.01, atol=0.001)

    vae.fit_synthesis(latents, smooth)
    error = (vae.decode(latents).sample - smooth).pow(2).mean()
    projected = (patches(smooth) - patches(smooth).mean(0)).pow(2).mean() - deviation.pow(2).sum() / 192
    assert error < projected  # looking at the neighbours beats the best that single patches allow


@torch.no_grad()
@pytest.mark.parametrize("reduction", [1, 2, 4, 8])
def test_a_preview_is_the_linear_picture_reduced(reduction: int) -> None:
    torch.manual_seed(1)
    vae = PatchAutoencoder(latent_channels=4, width=20, depth=1)
    z = torch.randn(2, 4, 5, 7)
    whole = F.pixel_shuffle(vae.synthesis(z), 8)
    torch.testing.assert_close(vae.decode_preview(z, reduction), F.avg_pool2d(whole, reduction), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_tiles_leave_no_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(2)
    vae = PatchAutoencoder(latent_channels=4, width=40, depth=3)
    for parameter in vae.parameters():  # nothing may start at zero here, or a margin too small would not show
        if parameter.ndim == 4:
            nn.init.kaiming_normal_(parameter)
    x, z = torch.randn(1, 3, 45 * 8, 61 * 8), torch.randn(1, 4, 45, 61)
    latents, sample = vae.encode(x).latents, vae.decode(z).sample
    monkeypatch.setattr(autoencoder, "TILE", 44)
    torch.testing.assert_close(vae.encode(x).latents, latents, rtol=1e-4, atol=1e-4 * latents.abs().max().item())
    torch.testing.assert_close(vae.decode(z).sample, sample, rtol=1e-4, atol=1e-4 * sample.abs().max().item())
    monkeypatch.setattr(autoencoder, "MARGIN", 4)
    assert not torch.allclose(vae.decode(z).sample, sample, rtol=1e-4, atol=1e-4 * sample.abs().max().item())


def test_the_network_starts_as_nothing() -> None:
    vae = PatchAutoencoder(latent_channels=4, width=20, depth=1)
    x = torch.randn(1, 3, 16, 16)
    assert torch.equal(vae.encode(x).latents, vae.analysis(x))

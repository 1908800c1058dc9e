import pytest
import torch

from sora_lite.models.vae import CausalVAE, Posterior

SMALL = {
    "latent_channels": 4,
    "patch": 2,
    "widths": [8, 12, 16],
    "strides": [[2, 2], [2, 2]],
    "encoder_blocks": [1, 1, 1],
    "decoder_blocks": [1, 1, 1],
}


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    model = CausalVAE(**SMALL).eval()
    for parameter in model.parameters():  # zero-initialised layers would hide what they connect
        if parameter.abs().max() == 0:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def clip(frames: int) -> torch.Tensor:
    return torch.rand(2, 3, frames, 16, 24, generator=torch.Generator().manual_seed(frames)) * 2 - 1


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (5, 2), (9, 3), (17, 5)])
def test_shapes(vae: CausalVAE, frames: int, latents: int) -> None:
    assert (vae.time_factor, vae.space_factor) == (4, 8)
    mean = vae.encode(clip(frames)).mean
    assert mean.shape == (2, *vae.latent_shape(frames, 16, 24)) == (2, 4, latents, 2, 3)
    assert vae.decode(mean).shape == (2, 3, frames, 16, 24)


@torch.no_grad()
def test_encoder_and_decoder_are_causal(vae: CausalVAE) -> None:
    video = clip(17)
    whole = vae.encode(video).mean
    for latents, frames in ((1, 1), (2, 5), (4, 13)):
        part = vae.encode(video[:, :, :frames]).mean
        torch.testing.assert_close(part, whole[:, :, :latents], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(vae.encode(clip(17).flip(2)).mean[:, :, :1], whole[:, :, :1], atol=1e-3)
    decoded = vae.decode(whole)
    for latents, frames in ((1, 1), (3, 9)):
        torch.testing.assert_close(vae.decode(whole[:, :, :latents]), decoded[:, :, :frames], rtol=1e-4, atol=1e-5)
    # and what comes later does depend on what came before
    changed = whole.clone()
    changed[:, :, 0] += 1
    assert (vae.decode(changed)[:, :, 5] - decoded[:, :, 5]).abs().max() > 1e-4


def test_sizes_that_do_not_fit_are_refused(vae: CausalVAE) -> None:
    for shape in ((4, 16, 16), (5, 12, 16), (5, 16, 20)):
        with pytest.raises(ValueError, match="4k\\+1"):
            vae.latent_shape(*shape)


def test_divergence_equals_torch_distributions() -> None:
    mean, logvar = torch.randn(2, 3, 1, 2, 2), torch.randn(2, 3, 1, 2, 2)
    ours = Posterior(mean=mean, logvar=logvar).kl()
    theirs = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, (0.5 * logvar).exp()), torch.distributions.Normal(0.0, 1.0)
    ).mean()
    torch.testing.assert_close(ours, theirs)


def test_normalisation_is_per_channel_and_inverts(vae: CausalVAE) -> None:
    vae.latent_mean.copy_(torch.tensor([1.0, -2.0, 0.5, 0.0]))
    vae.latent_std.copy_(torch.tensor([2.0, 0.1, 1.0, 3.0]))
    latent = torch.randn(2, 4, 3, 2, 2)
    normal = vae.normalize(latent)
    torch.testing.assert_close(normal[:, 1], (latent[:, 1] + 2) / 0.1)
    torch.testing.assert_close(vae.denormalize(normal), latent)
    vae.latent_mean.zero_()
    vae.latent_std.fill_(1)


def test_fingerprint_sees_every_weight_and_statistic() -> None:
    torch.manual_seed(0)
    model = CausalVAE(**SMALL)
    seen = {model.fingerprint()}
    for tensor in model.state_dict().values():
        tensor.view(-1)[-1] += 1
        seen.add(model.fingerprint())
    assert len(seen) == len(model.state_dict()) + 1

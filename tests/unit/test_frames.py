"""Given frames: which are drawn, that they are encoded alone and placed in their slots, and that they come out."""

from collections import Counter

import numpy as np
import pytest
import torch

from sora_lite.config import ConditionConfig, FrameMode, FrameRule, SamplingConfig
from sora_lite.data.video import encode_mp4, encode_png
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.evaluation.page import contact_sheet
from sora_lite.generation.frames import (
    Given,
    decode_with_given,
    draw_given,
    encode_given,
    given_frames,
    given_mask,
    read_given,
    runs,
)
from sora_lite.generation.pipeline import Pipeline, Request, to_float, to_uint8
from sora_lite.models.dit import VideoDiT
from sora_lite.models.vae import CausalVAE


@pytest.fixture(scope="module")
def vae() -> CausalVAE:
    torch.manual_seed(0)
    model = CausalVAE(
        latent_channels=4, patch=4, widths=[16, 16, 16], strides=[[2, 2], [2, 1]], encoder_blocks=[0, 1, 1],
        decoder_blocks=[0, 1, 1],
    )  # fmt: skip
    for name, weight in model.named_parameters():  # time looks back, as it does after training
        if "mix" in name:
            torch.nn.init.normal_(weight, std=0.2)
    model.latent_mean.fill_(0.3)
    model.latent_std.fill_(0.7)
    return model.eval()


def clip(seed: int = 0, count: int = 3) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, 17, 16, 16), generator=draw, dtype=torch.uint8)


def mask(*places: int) -> torch.Tensor:
    given = torch.zeros(5, dtype=torch.bool)
    given[list(places)] = True
    return given


def test_modes_are_drawn_in_their_ratios() -> None:
    """Open-Sora's ratios: text only 1, first 5, first and last 1, last 1."""
    ratios = {FrameMode.none: 1, FrameMode.first: 5, FrameMode.first_last: 1, FrameMode.last: 1}
    rules = [FrameRule(mode=mode, weight=weight) for mode, weight in ratios.items()]
    drawn = Counter(tuple(draw_given(rules, 5, seed).tolist()) for seed in range(4000))
    for mode, weight in ratios.items():
        assert drawn[tuple(given_mask(mode, 5).tolist())] / 4000 == pytest.approx(weight / 8, abs=0.025)
    assert drawn.total() == 4000 and len(drawn) == 4


@pytest.mark.parametrize("mode", [FrameMode.before, FrameMode.after, FrameMode.random])
def test_some_frames_are_given_and_some_are_made(mode: FrameMode) -> None:
    drawn = [draw_given([FrameRule(mode=mode)], 5, seed) for seed in range(200)]
    assert {int(one.sum()) for one in drawn} == {1, 2, 3, 4}
    for one in drawn:
        if mode is not FrameMode.random:
            assert len(runs(one)) == 1 and bool(one[0 if mode is FrameMode.before else -1])
    assert torch.equal(draw_given([FrameRule(mode=mode)], 5, 7), drawn[7])
    assert not draw_given([FrameRule(mode=mode)], 1, 0).any()  # a still image has nothing to go on from


def test_given_frames_are_encoded_alone_in_their_slots(vae: CausalVAE) -> None:
    video = to_float(clip())
    given = torch.stack([mask(0, 1), mask(4), mask(0, 2, 3)])
    frames, shown = encode_given(vae, video, given)
    assert torch.equal(shown[:, 0, :, 0, 0].bool(), given) and not frames[~given[:, None].expand(-1, 4, -1)].any()

    def alone(row: int, first: int, last: int) -> torch.Tensor:
        return vae.normalize(vae.encode(video[row : row + 1, :, first : last + 1]).mean)[0]

    for row, (first, last), pixels in [(0, (0, 1), (0, 4)), (1, (4, 4), (16, 16)), (2, (2, 3), (8, 12))]:
        torch.testing.assert_close(frames[row][:, first : last + 1], alone(row, *pixels), rtol=1e-4, atol=1e-5)
    # in the whole clip, a later latent frame carries what comes before it
    whole = vae.normalize(vae.encode(video).mean)
    assert torch.allclose(frames[0][:, :2], whole[0][:, :2], atol=1e-5)
    assert not torch.allclose(frames[1][:, 4], whole[1][:, 4], atol=1e-2)
    # and what is not given is not looked at
    hidden = video.clone()
    hidden[0, :, 5:] = 0
    hidden[1, :, :16] = 0
    assert torch.equal(encode_given(vae, hidden, given)[0], frames)


def test_given_frames_come_out_as_the_vae_makes_them(vae: CausalVAE) -> None:
    video = to_float(clip())
    given = torch.stack([mask(0, 1), mask(4), mask(0, 2, 3)])
    frames, _ = encode_given(vae, video, given)
    latents = torch.randn(3, 4, 5, 2, 2, generator=torch.Generator().manual_seed(1))
    made = decode_with_given(vae, latents, frames, given)
    for row in range(3):
        for first, last in runs(given[row]):
            part = video[row : row + 1, :, 4 * first : 4 * last + 1]
            expected = vae.decode(vae.encode(part).mean)[0]
            torch.testing.assert_close(made[row, :, 4 * first : 4 * last + 1], expected, rtol=1e-4, atol=1e-4)
    assert given_frames(given[2], 4) == [0, 8, 9, 10, 11, 12]
    # what follows the first frames is decoded from them, not from what was made in their place
    joined = torch.cat([frames[:1, :, :2], latents[:1, :, 2:]], dim=2)
    torch.testing.assert_close(made[0, :, 5:], vae.decode(vae.denormalize(joined))[0, :, 5:], rtol=1e-4, atol=1e-4)


def dit(frame_conditions: bool) -> VideoDiT:
    torch.manual_seed(0)
    model = VideoDiT(channels=4, width=24, depth=1, heads=2, num_classes=3, frame_conditions=frame_conditions)
    torch.nn.init.normal_(model.final.out.weight, std=0.1)
    return model.eval()


def test_a_model_of_text_goes_on_unharmed(vae: CausalVAE) -> None:
    """New weights start at zero: given frames change nothing until they are trained."""
    plain, able = dit(False), dit(True)
    missing = able.load_state_dict(plain.state_dict(), strict=False)
    assert missing.missing_keys == ["embed_frames.weight"] and not missing.unexpected_keys
    given = Given(video=clip(count=2), mask=torch.stack([mask(0), mask(1)]))
    requests, sampling = [Request(label=1)] * 2, SamplingConfig(steps=2, batch=1)

    def generate(model: VideoDiT, **more: Given) -> torch.Tensor:
        pipeline = Pipeline(model, vae, Process(), torch.device("cpu"))
        return torch.stack(list(pipeline.generate(requests, clip=(17, 16, 16), sampling=sampling, **more)))

    assert torch.equal(generate(plain), generate(able))
    untrained = generate(able, given=given)
    assert torch.equal(untrained[1, :4], generate(plain)[1, :4])  # before a given frame nothing changes
    alone = to_uint8(vae.decode(vae.encode(to_float(given.video[:1, :, :1])).mean))[0]
    assert (untrained[0, :1].permute(3, 0, 1, 2).int() - alone.int()).abs().max() <= 1
    torch.nn.init.normal_(able.embed_frames.weight)
    assert not torch.equal(generate(able, given=given)[1, :4], untrained[1, :4])
    with pytest.raises(UserError, match=r"model\.frame_conditions=true"):
        generate(plain, given=given)


def test_pictures_and_clips_are_read_into_place(tmp_path) -> None:
    moving = np.zeros((9, 32, 32, 3), np.uint8)
    moving[:] = (20 * np.arange(9, dtype=np.uint8))[:, None, None, None]
    (tmp_path / "clip.mp4").write_bytes(encode_mp4(moving, 8, 5))
    (tmp_path / "picture.png").write_bytes(encode_png(np.full((20, 40, 3), 200, np.uint8)))
    (tmp_path / "text.png").write_text("no picture")
    clip_path, picture = str(tmp_path / "clip.mp4"), str(tmp_path / "picture.png")

    def read(**condition: object) -> Given:
        return read_given(ConditionConfig(**condition), (17, 16, 16), 4, 2)

    given = read(first=clip_path, last=picture)
    levels = given.video[0].float().mean((0, 2, 3))
    assert given.mask.tolist() == [[True, True, False, False, True]] * 2
    assert np.allclose(levels[:5], [80, 100, 120, 140, 160], atol=3) and levels[16] == pytest.approx(200, abs=1)
    given = read(last=clip_path, frames=9)  # its first frames, at the end
    assert np.allclose(given.video[1].float().mean((0, 2, 3))[8:], 20 * np.arange(9), atol=3)
    assert given.mask[0].tolist() == [False, False, True, True, True]
    for says, condition in [
        ("is no file", {"first": str(tmp_path / "none.png")}),
        ("cannot be read", {"first": str(tmp_path / "text.png")}),
        (r"frames: 6 is not of the form 4k\+1", {"first": clip_path, "frames": 6}),
        ("has 9 frames, not 13", {"last": clip_path, "frames": 13}),
        ("pictures have one; leave it out", {"first": picture, "frames": 9}),
        ("leave none of 17 to make", {"first": clip_path, "last": clip_path, "frames": 9}),
    ]:
        with pytest.raises(UserError, match=says):
            read(**condition)


def test_given_frames_are_marked_on_the_contact_sheet() -> None:
    def marks(given: list[int]) -> int:
        sheet = np.asarray(contact_sheet([np.zeros((17, 32, 32, 3), np.uint8)], ["a"], columns=5, given=given))
        return int((np.abs(sheet.astype(int) - (0xE0, 0x8A, 0x3C)).max(-1) < 3).sum())

    assert marks([]) == 0 and marks([0, 16]) == 2 * marks([4]) > 0

"""Every objective trains, goes on, exports and generates with every sampler that serves it."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_inputs import Tiny, call

from sora_lite.config import Sampler, SamplingConfig
from sora_lite.diffusion.process import Process
from sora_lite.errors import UserError
from sora_lite.evaluation.record import RECORD, read_record
from sora_lite.generation.export import load_dit
from sora_lite.generation.pipeline import Pipeline, Request

CLIP = (17, 32, 32)


def words(tiny: Tiny, root: Path, *more: str) -> list[str]:
    return ["train", "experiment=tiny", f"data.shards={tiny.shards}", f"vae_from={tiny.vae}", f"run.root={root}", *more]


@pytest.mark.parametrize("choice", ["ddpm", "hybrid", "cosine", "v_prediction", "rectified_flow"])
def test_an_objective_goes_the_whole_way(
    choice: str, tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hybrid = choice == "hybrid"
    more = [f"diffusion={'ddpm' if hybrid else choice}", f"model.learn_variance={hybrid}", "run.sample_every=4"]
    if choice == "rectified_flow":
        more += ["diffusion.shift_by=sqrt", "diffusion.shift_tokens=5"]  # 20 tokens: a shift of 2
    assert call(*words(tiny, tmp_path, *more)) == 0
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    record = read_record(tmp_path / "tiny" / RECORD)
    (validation,) = [line for line in record if "val_loss" in line]
    times = [validation[f"val_loss_t{time}"] for time in (0.1, 0.3, 0.5, 0.7, 0.9)]
    assert validation["val_loss"] == pytest.approx(np.mean(times), rel=1e-5)
    for line in (line for line in record if "vlb" in line):
        assert hybrid and line["loss"] == pytest.approx(line["mse"] + line["vlb"], rel=1e-5)
    assert hybrid == ("val_vlb" in validation) == ("vlb" in record[0])
    assert (tmp_path / "tiny" / "samples" / "step_00000004.png").is_file()
    dit, vae, contract = load_dit(tmp_path / "tiny")
    process = Process(**contract.diffusion)
    assert process.shift_at(20) == (2.0 if choice == "rectified_flow" else 1.0)
    pipeline, asked = Pipeline(dit, vae, process, torch.device("cpu")), [Request(label=3), Request(label=1)]

    def generate(sampler: Sampler, **more) -> torch.Tensor:
        sampling = SamplingConfig(sampler=sampler, steps=3, **more)
        return torch.stack(list(pipeline.generate(asked, clip=CLIP, sampling=sampling)))

    for sampler in Sampler:
        if choice == "rectified_flow" and sampler is Sampler.ddpm:
            with pytest.raises(UserError, match=r"sampling\.sampler: ddpm does not serve rectified_flow: .*eta=1"):
                generate(sampler)
            continue
        both = generate(sampler, eta=1.0 if sampler is Sampler.ddim else 0.0)
        assert both.shape == (2, *CLIP, 3)
        # every generation has its own noise, in each step, whatever the batch
        alone = generate(sampler, eta=1.0 if sampler is Sampler.ddim else 0.0, batch=1)
        assert (both.float() - alone.float()).abs().mean() < 0.1 < (both[0].float() - both[1].float()).abs().mean()
    capsys.readouterr()
    if choice != "rectified_flow":
        with pytest.raises(UserError, match=r"sampling\.shift: is for rectified_flow"):
            generate(Sampler.euler, shift=2.0)
        with pytest.raises(UserError, match=r"sampling\.steps: \w+ has (1000|996) steps to sample, not 1001"):
            next(pipeline.generate(asked, clip=CLIP, sampling=SamplingConfig(steps=1001)))
        assert call(*words(tiny, tmp_path, "run.steps=5")) == 2  # goes on as something else
        assert "diffusion.objective was" in capsys.readouterr().err


def test_a_negative_prompt_leads_away(tiny: Tiny, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*words(tiny, tmp_path, "run.steps=1")) == 0
    assert call("export", f"run={tmp_path / 'tiny'}") == 0
    dit, vae, contract = load_dit(tmp_path / "tiny")
    for parameter in dit.parameters():  # text matters from the start
        if parameter.abs().max() < 0.01:
            torch.nn.init.normal_(parameter, std=0.3)
    pipeline = Pipeline(dit, vae, Process(**contract.diffusion), torch.device("cpu"))

    def generate(prompt: str, negative: str) -> torch.Tensor:
        asked, sampling = [Request(prompt=prompt)], SamplingConfig(steps=3, guidance=4.0)
        return next(iter(pipeline.generate(asked, clip=CLIP, sampling=sampling, negative_prompt=negative))).float()

    plain, away = generate("one digit", ""), generate("one digit", "another thing altogether")
    assert not torch.equal(plain, away)
    # away from what is asked for nothing is left to guide: as without guidance
    sampling = SamplingConfig(steps=3, guidance=1.0)
    (unguided,) = pipeline.generate([Request(prompt="one digit")], clip=CLIP, sampling=sampling)
    assert (generate("one digit", "one digit") - unguided.float()).abs().max() <= 1
    out = [f"out={tmp_path / 'out'}", f"model_from={tmp_path / 'tiny'}", "negative_prompt=blurry", "sampling.steps=1"]
    assert call("generate", "prompts=[one]", *out) == 0
    assert call("generate", "prompts=[one]", *out, "sampling.guidance=1") == 2
    assert "negative_prompt: 'blurry' was given, but sampling.guidance=1" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "overrides", "says"),
    [
        ("train", ["diffusion=ddpm", "diffusion.timesteps=logit_normal"], r"diffusion\.timesteps: logit_normal is for"),
        ("train", ["diffusion=ddpm", "diffusion.shift=3"], r"diffusion\.shift: moves the times of rectified_flow"),
        ("train", ["diffusion=cosine", "diffusion.shift_by=sqrt"], r"diffusion\.shift: moves the times"),
        ("train", ["diffusion=ddpm", "diffusion.zero_terminal_snr=true"], "needs the objective velocity"),
        ("train", ["diffusion.zero_terminal_snr=true"], "rectified_flow ends in pure noise as it is"),
        ("train", ["model=dit_xl_2"], r"model\.learn_variance: needs a noise schedule, .* take diffusion=ddpm"),
        ("train", ["model=dit_xl_2", "diffusion=ddpm", "diffusion.vlb_weight=0"], "leave the variance .* untrained"),
        ("train", ["diffusion.shift=0"], r"diffusion\.shift: must be above 0"),
        ("train", ["diffusion.vlb_weight=-1"], r"diffusion\.vlb_weight: must be at least 0"),
        ("generate", ["sampling.eta=0.5"], r"sampling\.eta: is for the sampler ddim; euler adds no noise"),
        ("generate", ["sampling.eta=1", "sampling.sampler=ddpm"], "ddpm adds the noise of its own variance"),
        ("generate", ["sampling.guidance_interval=[0.8,0.2]"], r"sampling\.guidance_interval: must be \[least"),
        ("generate", ["sampling.guidance_rescale=2"], r"sampling\.guidance_rescale: must lie in"),
        ("generate", ["sampling.guidance_channels=0"], r"sampling\.guidance_channels: must be at least 1"),
        ("generate", ["sampling.steps=0"], r"sampling\.steps: must be at least 1"),
        ("generate", ["sampling.sampler=dpmp_2m"], "dpmpp_2m"),
    ],
)
def test_what_does_not_go_together_is_refused(root: str, overrides: list[str], says: str) -> None:
    from sora_lite.cli.compose import compose

    given = {"train": ["run.name=a", "data.shards=b", "vae_from=c"], "generate": ["model_from=a"]}
    with pytest.raises(UserError, match=says):
        compose(root, [*given[root], *overrides])


def test_the_papers_row_is_one_choice_each() -> None:
    """`model=dit_xl_2 diffusion=ddpm`: noise prediction on linear betas, integer steps, and the hybrid loss."""
    from sora_lite.cli.compose import compose
    from sora_lite.generation.pipeline import make_process

    given = ["run.name=a", "data.shards=b", "vae_from=c"]
    config = compose("train", [*given, "model=dit_xl_2", "diffusion=ddpm"])
    assert config.model.learn_variance and config.diffusion.vlb_weight == 0.001
    assert make_process(config.diffusion) == Process(
        objective="epsilon", noise_schedule="linear", shift_slope=config.diffusion.shift_slope
    )

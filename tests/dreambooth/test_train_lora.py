import json
from dataclasses import replace

import peft
import pytest
import torch
from diffusers import UNet2DConditionModel
from jsonargparse import auto_cli

from dreambooth.base import Base
from dreambooth.data import Jitter, read_examples
from dreambooth.denoise import DenoiseConfig, DenoiseTask
from dreambooth.train_lora import CandidateConfig, CandidatesConfig, main, train_candidate
from mole_vl import mix, read_components
from mole_vl.gates import Sum
from mole_vl.training import FitConfig, read_snapshot
from mole_vl.training.rows import rows_of_step
from tests.dreambooth.toys import SIDE, write_base, write_examples


@pytest.fixture(params=["epsilon", "v_prediction"])
def prediction(request):
    return request.param


def config(folder, *, prediction="epsilon", candidates=None, output="loras", **fit):
    """One LoRA of one picture, or those that are given."""
    data = write_examples(folder / "data", ["a dog"])
    base = folder / "base"
    if not base.exists():
        write_base(base, prediction)
    settings = {"steps": 6, "rows": 4, "save_every": 2, "log_every": 1, "lr": 0.02, **fit}
    return CandidatesConfig(
        candidates=candidates or (CandidateConfig(name="dog", data=data, rank=3, alpha=2.0),),
        base=str(base),
        output=folder / output,
        fit=FitConfig(output=folder / f"runs-{output}", progress=False, **settings),
        denoise=DenoiseConfig(resolution=SIDE),
    )


def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder / "base", subfolder="unet").eval()


def call(model):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, SIDE // 2, SIDE // 2, generator=generator)
    states = torch.randn(2, 5, 12, generator=generator)
    return model(noisy, torch.tensor([10, 900]), states).sample


def losses(folder, name="dog", output="loras"):
    lines = (folder / f"runs-{output}" / name / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["denoise"] for line in lines]


def test_one_picture_is_learned(tmp_path, prediction):
    settings = config(tmp_path, prediction=prediction, steps=40, lr=0.05)
    main(settings)
    base = Base.load(settings.base)
    task = DenoiseTask(base, read_examples(tmp_path / "data"), {}, settings.denoise)
    task.place(torch.device("cpu"))
    unseen = task.batch(rows_of_step(seed=1, step=0, rows=64))
    before = task.losses(unseen)["denoise"].value
    mix(base.unet, [read_components(settings.output / "dog")["unet"]], gate=Sum(), site="matrix")
    after = task.losses(unseen)["denoise"].value
    assert after < 0.98 * before  # the same rows, and a base that knows nothing


def test_what_is_written_computes_in_a_mixture_what_it_computes_in_peft(tmp_path):
    main(config(tmp_path))
    folder = tmp_path / "loras" / "dog"
    assert [path.name for path in folder.iterdir()] == ["unet"]
    expert = read_components(folder)["unet"]
    assert expert.name == "dog" and expert.base == str(tmp_path / "base")
    assert all(f.a.dtype == f.b.dtype == torch.float16 for f in expert.layers.values())
    assert all(f.rank == 3 and f.scale == pytest.approx(2 / 3) for f in expert.layers.values())
    assert {path.rsplit("to_", 1)[1] for path in expert.layers} == {"q", "k", "v", "out.0"}
    mixed, plain = unet(tmp_path), call(unet(tmp_path))
    mix(mixed, [expert], gate=Sum(), site="matrix")
    adapted = peft.PeftModel.from_pretrained(unet(tmp_path), folder / "unet")
    assert (call(mixed) - plain).abs().max() > 1e-4
    torch.testing.assert_close(call(mixed), call(adapted), atol=1e-5, rtol=1e-4)


def test_the_base_is_left_as_it_was(tmp_path):
    settings = config(tmp_path)
    base = Base.load(settings.base)
    before = call(base.unet)
    names = set(base.unet.state_dict())
    train_candidate(base, read_examples(tmp_path / "data"), settings.candidates[0], settings)
    assert torch.equal(call(base.unet), before)
    assert set(base.unet.state_dict()) == names
    assert not any(p.requires_grad for p in base.unet.parameters())


def digest(folder):
    return read_components(folder)["unet"].digest


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch):
    main(config(tmp_path, output="unbroken"))
    seen = []

    def stop(task, batch, losses=DenoiseTask.losses):
        seen.append(batch)
        if len(seen) == 4:
            raise KeyboardInterrupt
        return losses(task, batch)

    monkeypatch.setattr(DenoiseTask, "losses", stop)
    with pytest.raises(KeyboardInterrupt):
        main(config(tmp_path, output="broken"))
    assert read_snapshot(tmp_path / "runs-broken" / "dog").step == 2
    assert not (tmp_path / "broken").exists()
    main(config(tmp_path, output="broken"))
    assert len(seen) == 4 + 4
    assert digest(tmp_path / "unbroken" / "dog") == digest(tmp_path / "broken" / "dog")
    assert losses(tmp_path, output="unbroken") == losses(tmp_path, output="broken")


def test_candidates_of_differing_rank_alone_and_after_one_another_are_the_same(tmp_path, capsys):
    data = write_examples(tmp_path / "cats", ["a cat", "red cat"])
    (data / "metadata.jsonl").unlink()
    both = (
        CandidateConfig(name="cat", data=data, prompt="a cat", rank=2, alpha=4.0, steps=3),
        CandidateConfig(name="dog", data=tmp_path / "data", rank=5, alpha=1.0, targets=("to_v",)),
    )
    main(config(tmp_path, candidates=both, output="both"))
    main(config(tmp_path, candidates=both[1:], output="alone"))
    cat, dog = (read_components(tmp_path / "both" / name)["unet"] for name in ("cat", "dog"))
    assert {f.rank for f in cat.layers.values()} == {2}
    assert {f.rank for f in dog.layers.values()} == {5}
    assert all(path.endswith("to_v") for path in dog.layers)
    assert digest(tmp_path / "alone" / "dog") == dog.digest
    assert len(losses(tmp_path, "cat", output="both")) == 3
    capsys.readouterr()
    main(config(tmp_path, candidates=both, output="both"))
    assert capsys.readouterr().out == f"all 2 LoRAs are in {tmp_path / 'both'}\n"


def test_faults_come_before_any_training(tmp_path):
    missing = CandidateConfig(name="none", data=tmp_path / "none")
    good = CandidateConfig(name="dog", data=tmp_path / "data")
    with pytest.raises(FileNotFoundError, match="none is no folder"):
        main(config(tmp_path, candidates=(good, missing)))
    odd = CandidateConfig(name="odd", data=tmp_path / "data", targets=("to_q", "to_x", "norm1"))
    with pytest.raises(
        ValueError, match=r"odd: 'to_x' names no layer .*'norm1' names a GroupNorm, expected lin"
    ):
        main(config(tmp_path, candidates=(good, odd)))
    with pytest.raises(ValueError, match="resolution is 15, expected a multiple of 2"):
        main(replace(config(tmp_path), denoise=DenoiseConfig(resolution=15)))
    assert not (tmp_path / "runs-loras").exists()


def test_all_faults_of_a_config_come_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"name is 'a/dog', .*rank is 0.*alpha is -1.*targets is empty.*steps is 0"
    ):
        CandidateConfig(name="a/dog", data=tmp_path, rank=0, alpha=-1, targets=(), steps=0)
    twins = tuple(CandidateConfig(name="dog", data=tmp_path) for _ in range(2))
    with pytest.raises(ValueError, match="two candidates are called dog"):
        config(tmp_path, candidates=twins)


def test_a_yaml_file_is_a_config(tmp_path):
    settings = config(tmp_path, steps=2)
    (tmp_path / "loras.yaml").write_text(
        f"base: {settings.base}\noutput: {settings.output}\n"
        f"fit: {{output: {settings.fit.output}, steps: 2, rows: 2}}\n"
        f"denoise: {{resolution: {SIDE}, jitter: {{shift: 0.1}}, caption_dropout: 0.1}}\n"
        f"candidates: [{{name: dog, data: {tmp_path / 'data'}, rank: 2}}]\n"
    )
    arguments = ["--config", str(tmp_path / "loras.yaml"), "--denoise.jitter.shrink", "0.9"]
    read = auto_cli(CandidatesConfig, as_positional=False, args=arguments)
    assert read.fit.steps == 2
    assert read.denoise == DenoiseConfig(
        resolution=SIDE, jitter=Jitter(shift=0.1, shrink=0.9), caption_dropout=0.1
    )
    assert read.candidates == (CandidateConfig(name="dog", data=tmp_path / "data", rank=2),)

"""Whole LoRAs over every kind of base: text encoders, convolutions, files, samples, cost."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image

from dreambooth.base import Base
from dreambooth.candidates import TextLora
from dreambooth.class_pictures import PriorConfig
from dreambooth.denoise import DenoiseTask
from dreambooth.lora_files import read_lora
from dreambooth.train_lora import main
from mole_vl import read_components
from mole_vl.gates import Sum
from mole_vl.training import read_snapshot
from pipelines import MoLEStableDiffusionPipeline, MoLEStableDiffusionXLPipeline
from tests.dreambooth.kinds import KINDS, candidates, reload
from tests.dreambooth.toys import write_picture
from tests.pipelines.toys import draw, quiet, same

# peft asks transformers by a name that goes out of use.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TARGETS = ("to_q", "to_v", "conv1", "conv_shortcut", "downsamplers.0.conv")
TEXT = TextLora(rank=3, alpha=1.7, targets=("q_proj", "v_proj", "fc1"))
WHOLE = {"targets": TARGETS, "text_encoder": TEXT, "prompt": None}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


def ours(kind, folder):
    xl = kind == "sdxl"
    made = MoLEStableDiffusionXLPipeline if xl else MoLEStableDiffusionPipeline
    return quiet(made.from_pretrained(folder, **({} if xl else {"safety_checker": None})))


def digests(folder):
    return {part: expert.digest for part, expert in read_components(folder).items()}


def test_a_trained_lora_draws_in_plain_diffusers_what_our_mixture_draws(tmp_path, kind):
    also = {"also": ("diffusers", "kohya")}
    main(candidates(tmp_path, kind, more=also, fit={"lr": 0.1}, **WHOLE))
    folder = tmp_path / "loras" / "dog"
    parts = ["text_encoder", "unet"] + ["text_encoder_2"] * (kind == "sdxl")
    assert read_components(folder).keys() == set(parts)
    assert any(f.a.dim() == 4 for f in read_components(folder)["unet"].layers.values())
    mixed = ours(kind, tmp_path / "base")
    untouched = draw(mixed)
    mixed.load_experts([folder], gate=Sum())
    expected = draw(mixed)
    assert (expected - untouched).abs().max() > 1e-2
    for file in (folder, folder / "dog.safetensors"):
        pipe = reload(kind, tmp_path / "base")
        pipe.load_lora_weights(file)
        same(draw(pipe), expected)


def test_triggers_are_told_in_the_file(tmp_path):
    (tmp_path / "data").mkdir()
    write_picture(tmp_path / "data" / "dog.png")
    main(candidates(tmp_path, "sd1", prompt="a v dog", more={"also": ("kohya",)}))
    assert read_lora(tmp_path / "loras" / "dog" / "dog.safetensors").triggers == ("a v dog",)


def test_the_text_encoder_learns_and_is_left_as_it_was(tmp_path, kind, monkeypatch):
    bases = []
    load = Base.load
    monkeypatch.setattr(
        Base, "load", classmethod(lambda _cls, *a: bases.append(load(*a)) or bases[-1])
    )
    main(candidates(tmp_path, kind, **WHOLE))
    fresh = load(str(tmp_path / "base"))
    assert bases[0].text_encoders.keys() == fresh.text_encoders.keys()
    for name, encoder in bases[0].text_encoders.items():
        other = fresh.text_encoders[name]
        assert encoder.state_dict().keys() == other.state_dict().keys()
        assert all(
            torch.equal(a, b) for a, b in zip(encoder.parameters(), other.parameters(), strict=True)
        )
        assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
        expert = read_components(tmp_path / "loras" / "dog")[name]
        assert all(
            f.rank == 3 and f.scale == pytest.approx(1.7 / 3) for f in expert.layers.values()
        )
        silent = {path for path, f in expert.layers.items() if not f.b.any()}
        # SDXL reads the first encoder's states before the last layer, which therefore never learns.
        unread = kind == "sdxl" and name == "text_encoder"
        assert silent == {path for path in expert.layers if unread and ".1." in path}
        assert {path.rsplit(".", 1)[1] for path in expert.layers} == {"q_proj", "v_proj", "fc1"}


def test_checkpointing_changes_no_number(tmp_path, kind):
    main(candidates(tmp_path, kind, output="plain", **WHOLE))
    main(candidates(tmp_path, kind, output="checkpointed", more={"checkpointing": True}, **WHOLE))
    plain, other = (read_components(tmp_path / name / "dog") for name in ("plain", "checkpointed"))
    for part, expert in plain.items():
        for path, factors in expert.layers.items():
            found = other[part].layers[path]
            torch.testing.assert_close(found.delta(), factors.delta(), atol=1e-4, rtol=1e-2)


def test_checkpointing_runs_layers_again(tmp_path, monkeypatch):
    runs = []

    def counted(run):
        def forward(self, *args, **kwargs):
            runs.append(type(self).__name__)
            return run(self, *args, **kwargs)

        return forward

    for kind in (
        "diffusers.models.resnet.ResnetBlock2D",
        "transformers.models.clip.modeling_clip.CLIPAttention",
    ):
        module, _, name = kind.rpartition(".")
        owner = getattr(__import__(module, fromlist=[name]), name)
        monkeypatch.setattr(owner, "forward", counted(owner.forward))
    counts = []
    for on in (False, True):
        runs.clear()
        settings = candidates(
            tmp_path, "sd1", output=f"out{on}", more={"checkpointing": on}, **WHOLE
        )
        main(settings)
        counts.append({name: runs.count(name) for name in set(runs)})
    assert counts[1]["ResnetBlock2D"] > counts[0]["ResnetBlock2D"]
    assert counts[1]["CLIPAttention"] == 2 * counts[0]["CLIPAttention"]


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path, monkeypatch, optimizer):
    settings = {
        **WHOLE,
        "rank": 64,  # big enough for averages of 8 bits
        "prior": PriorConfig(prompt="a dog", pictures=tmp_path / "class", count=2),
        "samples": ("a dog",),
        "fit": {"optimizer": optimizer},
    }
    watched = {"more": {"sample_every": 1}}
    main(candidates(tmp_path, "sdxl", output="unbroken", **settings, **watched))
    steps = []

    def stop(task, batch, losses=DenoiseTask.losses):
        steps.append(batch)
        if len(steps) == 4:
            raise KeyboardInterrupt
        return losses(task, batch)

    monkeypatch.setattr("dreambooth.denoise.DenoiseTask.losses", stop)
    with pytest.raises(KeyboardInterrupt):
        main(candidates(tmp_path, "sdxl", output="broken", **settings))
    main(candidates(tmp_path, "sdxl", output="broken", **settings))
    assert digests(tmp_path / "unbroken" / "dog") == digests(tmp_path / "broken" / "dog")


def test_samples_are_drawn_on_the_way_from_the_same_noise(tmp_path):
    samples = {"samples": ("a dog", "red"), "fit": {"lr": 0.1, "trackers": ("tensorboard",)}}
    main(candidates(tmp_path, "sd1", more={"sample_every": 3}, **samples))
    run = tmp_path / "runs-loras" / "dog"
    files = sorted((run / "samples").iterdir())
    assert [file.name for file in files] == ["step-00000003.png", "step-00000004.png"]
    pictures = [Image.open(file).tobytes() for file in files]
    assert pictures[0] != pictures[1]
    events = b"".join(file.read_bytes() for file in run.rglob("events.out.tfevents*"))
    assert events.count(b"samples/a dog") >= 2
    main(candidates(tmp_path, "sd1", output="unseen", fit={"lr": 0.1}))
    assert digests(tmp_path / "unseen" / "dog") == digests(tmp_path / "loras" / "dog")
    # A LoRA that learned nothing draws the base's pictures at every step.
    main(
        candidates(
            tmp_path,
            "sd1",
            output="still",
            samples=("a dog",),
            fit={"lr": 1e-12},
            more={"sample_every": 2},
        )
    )
    still = sorted((tmp_path / "runs-still" / "dog" / "samples").iterdir())
    assert still[0].read_bytes() == still[1].read_bytes()


def test_a_dry_run_tells_the_cost_and_trains_nothing(tmp_path, capsys):
    prior = PriorConfig(prompt="a dog", pictures=tmp_path / "class", count=7)
    more = {"dry_run": True, "sample_every": 3}
    settings = candidates(tmp_path, "sdxl", more=more, prior=prior, samples=("a", "b"), **WHOLE)
    main(settings)
    told = capsys.readouterr().out
    assert not (tmp_path / "loras").exists() and not (tmp_path / "runs-loras").exists()
    assert not (tmp_path / "class").exists()
    main(type(settings)(**{**vars(settings), "dry_run": False}))
    experts = read_components(tmp_path / "loras" / "dog")
    sizes = {
        part: sum(f.a.numel() + f.b.numel() for f in expert.layers.values())
        for part, expert in experts.items()
    }
    assert f"dog: trains {sum(sizes.values()):,} parameters" in told
    for part, size in sizes.items():
        assert f"{size:,} in {len(experts[part].layers)} layers of the {part}" in told
    assert "4 steps of 2 rows: 2 pictures, each shown 4 times" in told
    assert "8 rows of class pictures beside them, 7 pictures of 'a dog' to be drawn" in told
    assert "4 samples on the way" in told
    assert f"{sum(sizes.values()) * 16 / 2**20:.2f} MiB of the LoRA" in told


def test_other_settings_do_not_go_on_with_a_run(tmp_path):
    main(candidates(tmp_path, "sd1"))
    (tmp_path / "loras" / "dog").rename(tmp_path / "kept")
    with pytest.raises(ValueError, match=r"text_encoder was None, is .*'rank': 3"):
        main(candidates(tmp_path, "sd1", text_encoder=TEXT))


def test_faults_of_targets_name_the_component(tmp_path):
    wrong = TextLora(targets=("q_proj", "to_q", "token_embedding"))
    with pytest.raises(
        ValueError,
        match=r"dog \(text_encoder\): 'to_q' names no layer of CLIP.*names a Embedding, expected l",
    ):
        main(candidates(tmp_path, "sd1", text_encoder=wrong))
    with pytest.raises(ValueError, match=r"TextLora: rank is 0.*alpha is -1.*targets is empty"):
        TextLora(rank=0, alpha=-1, targets=())
    long = candidates(tmp_path, "sd1", samples=("reddddddddddddd",))
    with pytest.raises(ValueError, match="'reddddddddddddd' has 17 tokens, expected at most 12"):
        main(long)


def test_bf16_keeps_the_frozen_weights_in_it_and_the_factors_in_fp32(tmp_path, monkeypatch):
    seen = []
    load = Base.load
    monkeypatch.setattr(
        Base, "load", classmethod(lambda _cls, *a: seen.append(load(*a)) or seen[-1])
    )
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    try:
        main(candidates(tmp_path, "sdxl", samples=("a dog",), **WHOLE))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
    assert seen[0].unet.dtype == seen[0].text_encoder_2.dtype == torch.bfloat16
    weights = read_snapshot(tmp_path / "runs-loras" / "dog").weights
    assert {w.dtype for w in weights.values()} == {torch.float32}
    lines = (tmp_path / "runs-loras" / "dog" / "metrics.jsonl").read_text().splitlines()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION")
    main(candidates(tmp_path, "sdxl", output="exact", **WHOLE))
    exact = (tmp_path / "runs-exact" / "dog" / "metrics.jsonl").read_text().splitlines()
    for found, line in zip(lines, exact, strict=True):
        assert json.loads(found)["denoise"] == pytest.approx(json.loads(line)["denoise"], rel=0.05)

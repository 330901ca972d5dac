"""Gates of a UNet: guidance, batches, every loss term, the whole way through."""

import json
from dataclasses import replace

import open_clip
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from dreambooth.adapter import blocks, positive_rows
from dreambooth.base import Base
from dreambooth.clip import Clip
from dreambooth.clip_task import ClipLoss, ClipTask, Scene
from dreambooth.data import Jitter
from dreambooth.goals import Goals, composed
from dreambooth.sampling import guided, sample, schedule
from dreambooth.subject_style import SubjectStyle
from mole_vl import Expert, Factors, mix, write_peft
from mole_vl.domain import prepare
from mole_vl.gates import Free, MoLE, Sigmoid
from mole_vl.training import FitConfig, Row, fit
from mole_vl.training.rows import rows_of_step
from tests.dreambooth.toys import SIDE, write_base, write_examples, write_picture
from tests.toys import randomise


def write_clip(folder):
    settings = {
        "embed_dim": 8,
        "vision_cfg": {
            "image_size": SIDE,
            "layers": 1,
            "width": 8,
            "head_width": 4,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 12,
            "vocab_size": 49408,
            "width": 8,
            "heads": 2,
            "layers": 1,
        },
    }
    folder.mkdir()
    content = {"model_cfg": settings, "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3}}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(3)
    model = open_clip.CLIP(**settings)
    # A start so small that pictures hardly differ would test nothing.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3.0 if parameter.dim() > 1 else 1.0)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return f"local-dir:{folder}"


def experts(unet, folder=None):
    made = []
    for name, rank in (("owl", 2), ("ink", 3)):
        layers = {
            path: Factors(torch.randn(rank, m.in_features), torch.randn(m.out_features, rank), 0.1)
            for path, m in unet.named_modules()
            if isinstance(m, nn.Linear) and path.endswith(("to_q", "to_k", "to_v"))
        }
        made.append(Expert(name, layers))
        if folder:
            write_peft(made[-1], folder / name / "unet")
    return made


@pytest.fixture
def base(tmp_path):
    return Base.load(write_base(tmp_path / "base", "v_prediction"))


def test_sampling_equals_the_pipeline_of_diffusers(tmp_path, base):
    pipeline = StableDiffusionPipeline.from_pretrained(base.name)
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = torch.randn(2, *base.latent_shape(SIDE))
    expected = pipeline(
        ["a dog", "an owl"], negative_prompt=["bad"] * 2, latents=noise, num_inference_steps=4,
        guidance_scale=2.5, output_type="latent",
    ).images  # fmt: skip
    states = base.encode_prompts(["bad", "bad", "a dog", "an owl"])
    found = sample(base, noise, states, schedule(base, 4), 2.5)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def test_guidance_in_one_batch_equals_two_passes_under_the_same_weights(base):
    mixture = mix(base.unet, experts(base.unet), gate=MoLE(), blocks=blocks(base.unet))
    randomise(mixture)
    latents, step = torch.randn(3, *base.latent_shape(SIDE)), torch.tensor(300)
    states = base.encode_prompts(["bad"] * 3 + ["a dog", "an owl", "a red cat"])
    with torch.no_grad():
        with mixture.condition(source=positive_rows(3)):
            together = guided(base, latents, step, states, 3.0)
        with mixture.record() as records:
            positive = base.predict(latents, step, states[3:])
        with mixture.pinned({r.site: r.output.weights for r in records}):
            negative = base.predict(latents, step, states[:3])
    expected = negative + 3 * (positive - negative)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=1e-4)


@pytest.fixture
def domain(tmp_path, base):
    experts(base.unet, tmp_path / "loras")
    return SubjectStyle(
        base=base.name,
        experts=[tmp_path / "loras/owl", tmp_path / "loras/ink"],
        prompt="an owl in ink",
        caption="an owl in ink style",
        pictures={
            "owl": write_examples(tmp_path / "owl", ["an owl"] * 2),
            "ink": write_examples(tmp_path / "ink", ["a dog"] * 3),
        },
        ordinary=write_examples(tmp_path / "ordinary", ["a thing"] * 4),
        clip=write_clip(tmp_path / "clip"),
        resolution=SIDE,
        loss=ClipLoss(steps=4, guidance=2.0),
        truth=write_picture(tmp_path / "truth.png", seed=9),
        drawn=2,
    )


def test_a_batch_of_pictures_equals_single_ones(domain):
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    randomise(mixture)
    together = domain.draw(3, seed=5)
    torch.testing.assert_close(domain.draw(1, seed=5)[0], together[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together[0], together[1], atol=1e-2)


def test_a_negative_row_has_gate_results_of_its_own_where_it_is_told_so(domain):
    domain.loss = ClipLoss(steps=2, first=0.0, last=0.0, negatives="own", text=0, l2=1.0)
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    randomise(mixture)
    drawn = domain.draw(1, seed=5)
    task = domain.task(0.0)
    batch = task.batch([Row(0, 0, 0, 1)])
    with mixture.record() as records:
        task.losses(batch)
    # Two passes, each row read alone: what the gates say must be the same.
    step = schedule(domain.base, 2).timesteps[0]
    alone = []
    for side in (slice(0, 1), slice(1, 2)):
        with mixture.record() as said, torch.no_grad():
            domain.base.predict(batch.noise, step, domain.states[side])
        alone.append([record.output.weights for record in said])
    for record, negative, positive in zip(records, *alone, strict=True):
        torch.testing.assert_close(record.output.weights, torch.cat([negative, positive]))
    domain.loss = replace(domain.loss, negatives="shared")
    assert not torch.allclose(domain.draw(1, seed=5), drawn, atol=1e-4)


def test_checkpointing_runs_blocks_again_and_changes_no_number(domain):
    def gradient():
        mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
        randomise(mixture)
        parts = (
            domain.base.unet.mid_block.attentions[0].transformer_blocks[0],
            domain.base.vae.decoder.mid_block,
        )
        runs = []
        for part in parts:
            part.register_forward_pre_hook(lambda module, *_: runs.append(module))
        task = domain.task(0.0)
        loss = sum(t.value for t in task.losses(task.batch([Row(0, 0, 0, 1)])).values())
        once = len(runs)
        found = torch.autograd.grad(loss, list(mixture.gates.parameters()))
        return loss, found, {part: runs[once:].count(part) for part in parts}

    domain.loss = ClipLoss(steps=3, first=1.0, last=1.0, through=3)
    loss, plain, again = gradient()
    assert set(again.values()) == {0}
    domain.checkpointing = True
    checkpointed, found, again = gradient()
    assert all(again.values())
    torch.testing.assert_close(checkpointed, loss)
    for one, other in zip(found, plain, strict=True):
        torch.testing.assert_close(one, other)


def test_no_picture_of_the_report_starts_from_a_noise_of_the_training(domain):
    domain.mix(MoLE(), "block")
    starts = []
    domain.base.unet.register_forward_pre_hook(
        lambda _m, args, kwargs: starts.append((*args, kwargs.get("sample"))[0]), with_kwargs=True
    )
    domain.loss = ClipLoss(steps=2)
    domain.draw(2, seed=3)
    task = domain.task(0.0)
    for step in range(3):
        noise = task.batch([Row(3, step, index, 2) for index in range(2)]).noise
        assert not any(torch.equal(one, other) for one in starts[0] for other in noise)


def test_every_term_of_the_loss_moves_every_gate(domain):
    domain.loss = ClipLoss(steps=4, guidance=2.0, directional=0.5, l2=0.2, denoise=0.3)
    domain.words = {"owl": "an owl", "ink": "ink style"}
    mixture = domain.mix(MoLE(), "block")["unet"]
    randomise(mixture)
    task = domain.task(0.1)
    terms = task.losses(task.batch([Row(0, 0, index, 2) for index in range(2)]))
    assert terms.keys() == {"text", "picture", "directional", "l2", "denoise", "balance"}
    for name, term in terms.items():
        grads = torch.autograd.grad(term.value, list(mixture.gates.parameters()), retain_graph=True)
        assert all(grad.abs().max() > 0 for grad in grads), name
    assert all(parameter.grad is None for parameter in domain.base.unet.parameters())


def test_a_loss_is_the_mean_over_the_views_of_the_predicted_pictures(domain):
    domain.loss = ClipLoss(steps=4, last=0.0, views=3, jitter=Jitter(shift=0.2, shrink=0.6))
    mixture = domain.mix(MoLE(), "block")["unet"]
    randomise(mixture)
    task = domain.task(0.0)
    rows = [Row(0, 0, index, 2) for index in range(2)]
    batch = task.batch(rows)
    found = task.losses(batch)
    again = task.losses(batch)
    goals = domain.goals(domain.clip)
    base, distances = domain.base, {"text": [], "picture": []}
    step = schedule(base, 4).timesteps[0]
    for noise, row in zip(batch.noise, rows, strict=True):
        with mixture.condition(source=positive_rows(1)):
            output = guided(base, noise[None], step, domain.states, domain.loss.guidance)
        picture = base.decode(base.noising.clean(noise[None], output, step[None])).clamp(-1, 1)[0]
        chance = row.generator(stream=1)
        for _ in range(3):
            seen = domain.clip.pictures(domain.loss.jitter(picture, chance)[None])[0]
            distances["text"].append(1 - torch.cosine_similarity(seen, goals.caption, dim=0))
            offset = seen - goals.centre
            distances["picture"].append(1 - torch.cosine_similarity(offset, goals.offset, dim=0))
    for name, values in distances.items():
        torch.testing.assert_close(found[name].value, torch.stack(values).mean())
        assert torch.equal(again[name].value, found[name].value)


def test_the_directional_term_compares_moves_of_pictures_with_moves_of_words(domain):
    domain.loss = ClipLoss(
        steps=2, first=0.0, last=0.0, text=0, picture=0, directional=1.0, views=1, jitter=Jitter()
    )
    domain.words = {"owl": "an owl", "ink": "ink style"}
    mixture = domain.mix(MoLE(), "block")["unet"]
    randomise(mixture)
    task, clip = domain.task(0.0), domain.clip
    batch = task.batch([Row(0, 0, index, 2) for index in range(2)])
    found = task.losses(batch)
    assert found.keys() == {"directional"}
    step = schedule(domain.base, 2).timesteps[0]
    states = domain.states.repeat_interleave(2, 0)
    with mixture.condition(source=positive_rows(2)), torch.no_grad():
        output = guided(domain.base, batch.noise, step, states, domain.loss.guidance)
        clean = domain.base.noising.clean(batch.noise, output, step.expand(2))
        seen = clip.pictures(domain.base.decode(clean).clamp(-1, 1))
    caption, apart = clip.captions([domain.caption])[0], []
    for name, words in domain.words.items():
        move = caption - clip.captions([words])[0]
        start = clip.pictures(domain.pictures[name]).mean(0)
        apart += [1 - torch.cosine_similarity(one - start, move, dim=0) for one in seen]
    torch.testing.assert_close(found["directional"].value, torch.stack(apart).mean())


def test_the_denoising_term_is_that_of_the_experts_own_pictures_under_the_prompt(domain):
    domain.loss = ClipLoss(text=0, picture=0, denoise=2.0)
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    randomise(mixture)
    task, base = domain.task(0.0), domain.base
    rows = [Row(0, 0, index, 3) for index in range(3)]
    batch = task.batch(rows)
    found = task.losses(batch)
    assert found.keys() == {"denoise"}
    assert found["denoise"].weight == 2.0
    own, errors = torch.cat(list(domain.pictures.values())), []
    for row, noise in zip(rows, batch.noise, strict=True):
        chance = row.generator(stream=3)
        picture = own[torch.randint(len(own), (), generator=chance)]
        step = base.noising.draw_timestep(chance)[None]
        with torch.no_grad():
            latents = base.encode(picture[None])
            noisy = base.noising.add_noise(latents, noise[None], step)
            predicted = base.predict(noisy, step, domain.states[1:])
        target = base.noising.target(latents, noise[None], step)
        errors.append((predicted - target).square().mean())
    torch.testing.assert_close(found["denoise"].value, torch.stack(errors).mean())


def test_the_l2_term_is_the_distance_to_one_of_the_experts_own_pictures(domain):
    domain.loss = ClipLoss(steps=2, first=1.0, last=1.0, text=0, picture=0, l2=1.0)
    mixture = domain.mix(MoLE(normaliser=Sigmoid()), "block")["unet"]
    randomise(mixture)
    task = domain.task(0.0)
    rows = [Row(0, 0, index, 2) for index in range(2)]
    batch = task.batch(rows)
    found = task.losses(batch)["l2"].value
    states = domain.states.repeat_interleave(2, 0)
    sampler = schedule(domain.base, 2)
    with mixture.condition(source=positive_rows(2)):
        latents = sample(domain.base, batch.noise, states, sampler, domain.loss.guidance)
    drawn = domain.base.decode(latents).clamp(-1, 1)
    own = torch.cat(list(domain.pictures.values()))
    picked = [own[torch.randint(len(own), (), generator=row.generator(stream=3))] for row in rows]
    expected = ((drawn + 1) / 2 - (torch.stack(picked) + 1) / 2).square().mean()
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(("through", "whole"), [(1, False), (2, False), (3, True), (9, True)])
def test_the_gradient_passes_as_many_calls_as_it_is_told(domain, through, whole):
    domain.loss = ClipLoss(
        steps=4, guidance=2.0, first=0.67, last=0.67, through=through, views=1, jitter=Jitter()
    )
    mixture = domain.mix(MoLE(normaliser=Sigmoid(), score=Free()), "network")["unet"]
    randomise(mixture)
    task = domain.task(0.0)
    batch = task.batch([Row(0, 0, index, 2) for index in range(2)])
    assert batch.upto == 2  # so that three calls bring the picture forth
    logits = mixture.gate("network").score.logits

    def loss():
        return sum(term.value for term in task.losses(batch).values())

    (found,) = torch.autograd.grad(loss(), logits)
    step, slope = 0.05, torch.zeros(2)
    with torch.no_grad():
        for index in range(2):
            logits[index] += step
            above = loss()
            logits[index] -= 2 * step
            slope[index] = (above - loss()) / (2 * step)
            logits[index] += step
    assert torch.allclose(found, slope, rtol=0.02, atol=1e-4) == whole


def test_every_row_draws_a_scene_of_its_own_with_the_experts_in_its_slots(base, tmp_path):
    made = [*experts(base.unet), Expert("fox", experts(base.unet)[0].layers)]
    slots = {"subject": ["owl", "fox"], "style": ["ink"]}
    gate = MoLE(normaliser=Sigmoid())
    mixture = mix(base.unet, made, gate=gate, blocks=blocks(base.unet), slots=slots)
    randomise(mixture)
    clip = Clip(write_clip(tmp_path / "clip"))
    scenes = []
    for name, place in (("an owl", 0), ("a fox", 2)):
        with torch.no_grad():
            states = base.encode_prompts(["bad", f"{name} in ink"])
        goals = Goals(*(torch.randn(8) for _ in range(3)), torch.randn(2, 8), torch.randn(2, 8))
        shown = torch.rand(3, 3, SIDE, SIDE) * 2 - 1
        scenes.append(Scene(states, goals, shown, (place, 1)))
    loss = ClipLoss(steps=3, guidance=2.0, views=2)
    parameters = dict(mixture.gates.named_parameters())

    def task(scenes):
        return ClipTask(base, mixture, scenes, SIDE, clip, loss, parameters=parameters)

    rows = rows_of_step(0, 0, 4)
    both = task(scenes)
    batch = both.batch(rows)
    assert {id(scene) for scene in batch.scenes} == {id(scene) for scene in scenes}
    found = both.losses(batch)
    for name in ("text", "picture"):
        singles = []
        for row, scene in zip(rows, batch.scenes, strict=True):
            alone = task([scene])
            # Its sampler's step is that of the whole batch.
            single = replace(alone.batch([row]), upto=batch.upto)
            singles.append(alone.losses(single)[name].value)
        expected = torch.stack(singles).mean()
        torch.testing.assert_close(found[name].value, expected, atol=1e-4, rtol=1e-4)


def test_goals_are_offsets_from_the_ordinary(domain):
    domain.mix(MoLE(), "block")
    goals = domain.goals(domain.clip)
    features = {name: domain.clip.pictures(p).mean(0) for name, p in domain.pictures.items()}
    centre = domain.clip.pictures(domain.ordinary).mean(0)
    torch.testing.assert_close(goals.offset, features["owl"] + features["ink"] - 2 * centre)
    torch.testing.assert_close(composed(centre, centre.unsqueeze(0)), torch.zeros(8))


def test_the_whole_way_from_training_to_a_report(tmp_path, domain):
    domain.mix(MoLE(), "block")
    run = FitConfig(output=tmp_path / "run", steps=3, rows=2, lr=0.05, progress=False)
    before = {k: v.clone() for k, v in domain.mixture.gates.state_dict().items()}
    fit(domain.task(0.0), run)
    assert any(not torch.equal(v, before[k]) for k, v in domain.mixture.gates.state_dict().items())
    table = domain.report(tmp_path / "run")
    arms = ["base", "owl", "ink", "sum", "NLA", "gates"]
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:]] == arms
    scores = json.loads((tmp_path / "run/scores.json").read_text())
    assert all(-1 <= x <= 1 for arm in scores.values() for xs in arm.values() for x in xs)
    with Image.open(tmp_path / "run/grid.png") as grid:
        assert grid.height > 7 * SIDE
    drawings = domain.drawings()
    with domain.mixture.disabled():
        torch.testing.assert_close(drawings["base"], domain.draw(2))


def test_a_run_is_not_resumed_with_another_loss(tmp_path, domain):
    run = FitConfig(output=tmp_path / "run", steps=1, rows=2, schedule="constant", progress=False)
    _, task, settings = prepare(domain, MoLE(), run)
    fit(task, run, settings)
    domain.loss = ClipLoss(steps=4, views=2)
    _, task, settings = prepare(domain, MoLE(), run)
    with pytest.raises(ValueError, match="loss was"):
        fit(task, run, settings)


def test_mistakes_are_named(tmp_path, domain):
    domain.picture_folders = {"owl": tmp_path / "owl"}
    with pytest.raises(ValueError, match="pictures are given for owl; the experts are ink, owl"):
        domain.mix(MoLE(), "block")
    domain.picture_folders = {"owl": tmp_path / "owl", "ink": tmp_path / "loras"}
    with pytest.raises(ValueError, match="has no pictures"):
        domain.mix(MoLE(), "block")
    domain.picture_folders = {"owl": tmp_path / "owl", "ink": tmp_path / "none"}
    with pytest.raises(FileNotFoundError, match="none is no folder: expected one of pictures"):
        domain.mix(MoLE(), "block")
    (tmp_path / "owl/0.png").write_text("no picture")
    with pytest.raises(ValueError, match=r"owl: 0.png is damaged or no picture"):
        domain.mix(MoLE(), "block")
    domain.expert_folders = [tmp_path / "loras/owl/unet"]
    with pytest.raises(
        ValueError, match=r"has no unet folder \(found the LoRA's files themselves\): expected"
    ):
        domain.mix(MoLE(), "block")
    domain.expert_folders = [tmp_path / "loras/owl"] * 2
    with pytest.raises(ValueError, match="experts share the names owl"):
        domain.mix(MoLE(), "block")
    with pytest.raises(ValueError, match="site 'preview' holds one reading"):
        domain.mix(MoLE(), "preview", 1)
    with pytest.raises(ValueError, match=r"steps is 0, .*first is 0.9, last is 0.2"):
        ClipLoss(steps=0, first=0.9, last=0.2)
    with pytest.raises(ValueError, match=r"guidance is 0.5, expected at least 1"):
        ClipLoss(guidance=0.5)
    with pytest.raises(
        FileNotFoundError, match=r"/nope has no model_index.json: expected a Stable"
    ):
        Base.load("/nope")
    with pytest.raises(ValueError, match=r"prompts: 'a a a .*\[...\]' has \d+ tokens, expected"):
        Base.load(domain.base_name).encode_prompts(["a " * 99])
    with pytest.raises(ValueError, match="negatives is 'none', expected one of shared, own"):
        ClipLoss(negatives="none")
    with pytest.raises(ValueError, match="all of text, picture, directional, l2, denoise are 0"):
        ClipLoss(text=0, picture=0)


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("truth_file", "none.png", r"truth: .*none.png is no file, expected a picture"),
        ("truth_file", "text.png", r"truth: text.png is damaged or no picture"),
        ("judge_name", "local-dir:{}/none", r"none/open_clip_config.json is no file, expected a f"),
        ("judge_name", "{}/clip", r"CLIP .*clip is a folder: write local-dir:/.*clip"),
        ("clip_name", "ViT-B-32", "CLIP ViT-B-32 says nothing of weights, expected local-dir"),
        ("resolution", 15, "resolution is 15, expected a multiple of 2"),
    ],
)
def test_what_cannot_be_used_is_found_before_the_training(
    tmp_path, domain, setting, value, message
):
    (tmp_path / "text.png").write_text("no picture")
    if setting == "truth_file":
        value = tmp_path / value
    setattr(domain, setting, value.format(tmp_path) if isinstance(value, str) else value)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        domain.mix(MoLE(), "block")


def test_settings_that_cannot_be_are_refused_at_once(tmp_path):
    with pytest.raises(
        ValueError, match=r"caption is empty, .*; resolution is 0, .*; drawn is 0, expected at l"
    ):
        SubjectStyle("base", [], "p", " ", {}, tmp_path, "clip", resolution=0, drawn=0)
    loss, given = ClipLoss(directional=1.0), {"owl": tmp_path, "ink": tmp_path}
    with pytest.raises(ValueError, match=r"words is not given, expected what each expert's pict"):
        SubjectStyle("base", [], "p", "an owl", given, tmp_path, "clip", loss=loss)
    with pytest.raises(
        ValueError, match=r"words is given for owl, expected the names .*: ink, owl"
    ):
        SubjectStyle("base", [], "p", "c", given, tmp_path, "clip", words={"owl": "an owl"})


def test_blocks_come_in_the_order_they_run_and_fused_projections_are_refused(base):
    order = [path.split(".")[0] for path in blocks(base.unet)]
    assert order == ["down_blocks", "mid_block", "up_blocks", "up_blocks"]
    mixture = mix(base.unet, experts(base.unet), gate=MoLE(), blocks=blocks(base.unet))
    with pytest.raises(RuntimeError, match="on a mixed model"):
        base.unet.fuse_qkv_projections()
    mixture.unmix()
    base.unet.fuse_qkv_projections()
    with pytest.raises(ValueError, match=r"runs with fused projections \(FusedAttnProcessor2_0\)"):
        blocks(base.unet)

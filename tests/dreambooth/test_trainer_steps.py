"""The trainer against a plain loop, step by step: what was trained with it can be trained again."""

import torch
from diffusers import DDPMScheduler
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F

from dreambooth.base import Base
from dreambooth.data import Jitter, load_picture, read_examples
from dreambooth.denoise import DenoiseConfig
from dreambooth.train_lora import CandidateConfig, CandidatesConfig, main
from mole_vl import read_components
from mole_vl.training import FitConfig
from mole_vl.training.rows import rows_of_step
from tests.dreambooth.toys import SIDE, write_base, write_examples

STEPS, ROWS = 4, 3
FIT = {"steps": STEPS, "rows": ROWS, "lr": 2e-3, "schedule": "cosine", "warmup": 2}
DENOISE = DenoiseConfig(
    resolution=SIDE, jitter=Jitter(shift=0.06, shrink=0.88), caption_dropout=0.4
)


def plain_loop(base, examples, fit):
    """Noise, targets, optimiser and clipping by what torch, diffusers and peft give."""
    torch.manual_seed(fit.seed)
    unet = get_peft_model(
        base.unet, LoraConfig(r=3, lora_alpha=2.0, target_modules=["to_q", "to_out.0"])
    )
    trained = [p for p in unet.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0)
    scheduler = DDPMScheduler.from_pretrained(base.name, subfolder="scheduler")
    for step in range(STEPS):
        pictures, captions, draws, noises, times = [], [], [], [], []
        for row in rows_of_step(fit.seed, step, ROWS):
            chance = row.generator()
            example = examples[row.pick(len(examples))]
            pictures.append(DENOISE.jitter(load_picture(example.file, SIDE), chance))
            captions.append("" if torch.rand((), generator=chance) < 0.4 else example.text)
            draws.append(torch.randn(4, SIDE // 2, SIDE // 2, generator=chance))
            noises.append(torch.randn(4, SIDE // 2, SIDE // 2, generator=chance))
            times.append(torch.randint(1000, (), generator=chance))
        noise, time = torch.stack(noises), torch.stack(times)
        posterior = base.vae.encode(torch.stack(pictures)).latent_dist
        latents = (posterior.mean + posterior.std * torch.stack(draws)) * 0.7
        ids = base.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        states = base.text_encoder(ids).last_hidden_state
        noisy = scheduler.add_noise(latents, noise, time)
        F.mse_loss(unet(noisy, time, states).sample, noise).backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        for group in optimizer.param_groups:
            group["lr"] = fit.rate(step)
        optimizer.step()
        optimizer.zero_grad()
    return {
        path: (module.lora_A["default"].weight.detach(), module.lora_B["default"].weight.detach())
        for path, module in unet.get_base_model().named_modules()
        if hasattr(module, "lora_A")
    }


def test_the_trainer_takes_a_plain_loops_steps(tmp_path):
    write_base(tmp_path / "base")
    data = write_examples(tmp_path / "data", ["a dog", "red dog"])
    fit = FitConfig(output=tmp_path / "runs", progress=False, **FIT)
    candidate = CandidateConfig(
        name="dog", data=data, rank=3, alpha=2.0, targets=("to_q", "to_out.0")
    )
    base = str(tmp_path / "base")
    main(
        CandidatesConfig(
            candidates=(candidate,), base=base, output=tmp_path / "out", fit=fit, denoise=DENOISE
        )
    )
    found = read_components(tmp_path / "out" / "dog")["unet"].layers
    expected = plain_loop(Base.load(base), read_examples(data), fit)
    assert found.keys() == expected.keys()
    for path, (a, b) in expected.items():
        assert torch.equal(found[path].a, a.half()) and torch.equal(found[path].b, b.half())
        assert b.abs().max() > 1e-3

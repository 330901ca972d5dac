"""diffusers' own LoRAs and a mixture do not meet; offloading does no harm."""

import accelerate
import pytest
import torch
from diffusers import StableDiffusionPipeline

from mole_vl.gates import Free, MoLE
from tests.pipelines.toys import TEXT, draw, loras, mixed, same, sd1

METHODS = {
    "load_lora_weights": ("x",),
    "unload_lora_weights": (),
    "fuse_lora": (),
    "unfuse_lora": (),
    "set_adapters": (["x"],),
    "delete_adapters": ("x",),
    "enable_lora": (),
    "disable_lora": (),
}


@pytest.mark.parametrize("method", METHODS)
def test_diffusers_loras_are_refused_on_a_mixed_pipeline(method):
    pipe = mixed()
    expected = draw(pipe)
    with pytest.raises(RuntimeError, match=rf"{method}\(\) would change .* use load_experts\(\)"):
        getattr(pipe, method)(*METHODS[method])
    assert torch.equal(draw(pipe), expected)


def test_they_are_diffusers_own_without_experts():
    pipe = sd1()
    pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="Invalid LoRA checkpoint"):
        pipe.load_lora_weights({"unet.x": torch.zeros(1)})
    tensors = {
        f"{path}.lora_{letter}.weight": getattr(factors, letter.lower())
        for path, factors in loras(pipe)[0]["unet"].layers.items()
        for letter in "AB"
    }
    pipe.load_lora_weights({f"unet.{key}": tensor for key, tensor in tensors.items()})
    with pytest.raises(RuntimeError, match="unet carries LoRAs of load_lora_weights"):
        pipe.load_experts(loras(sd1()))
    pipe.unload_lora_weights()
    pipe.load_experts(loras(pipe))


def test_xformers_is_missing_and_that_is_said():
    pipe = mixed()
    expected = draw(pipe)
    with pytest.raises(ModuleNotFoundError, match="xformers is not installed"):
        pipe.enable_xformers_memory_efficient_attention()
    assert torch.equal(draw(pipe), expected)


def test_fused_projections_are_refused():
    with pytest.raises(RuntimeError, match="past its experts"):
        mixed().fuse_qkv_projections(vae=False)


@pytest.mark.parametrize("kind", ["reading", "constant"])
def test_models_offloaded_as_a_whole(kind):
    """`enable_model_cpu_offload` asks for an accelerator; these are the hooks that it sets."""
    pipe = mixed(parts=TEXT, **({} if kind == "reading" else {"gate": MoLE(score=Free())}))
    expected = draw(pipe)
    hook = None
    for part in (*TEXT, "vae"):
        _, hook = accelerate.cpu_offload_with_hook(getattr(pipe, part), "cpu", hook)
    same(draw(pipe), expected)
    same(draw(pipe, masked=["ann"]), draw(mixed_like(pipe), masked=["ann"]))
    pipe.remove_all_hooks()
    pipe.unload_experts()
    assert torch.equal(draw(pipe), draw(sd1()))


def mixed_like(pipe):
    reading = pipe.mixtures["unet"].spec.reads_input
    return mixed(parts=TEXT, **({} if reading else {"gate": MoLE(score=Free())}))


def test_layers_offloaded_one_by_one():
    """Where things lie: accelerate's hooks of layers cannot run from CPU to CPU, mixed or not."""
    pipe = mixed(parts=TEXT)
    expected = draw(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    assert pipe.unet.conv_in.weight.is_meta
    for mixture in pipe.mixtures.values():
        assert all(layer.weight.is_meta for layer in mixture.layers.values())
        assert not any(tensor.is_meta for tensor in mixture.gates.state_dict().values())
        for layer in mixture.layers.values():
            assert not any(factor.is_meta for factor in layer.buffers(recurse=False))
    pipe.remove_all_hooks()
    same(draw(pipe), expected)
    pipe.unload_experts()
    assert torch.equal(draw(pipe), draw(sd1()))


def test_experts_come_before_offloading_by_layers():
    pipe = sd1()
    experts = loras(pipe)
    pipe.enable_sequential_cpu_offload(device="cpu")
    with pytest.raises(RuntimeError, match="unet is offloaded, its weights are elsewhere"):
        pipe.load_experts(experts)
    assert isinstance(pipe, StableDiffusionPipeline)

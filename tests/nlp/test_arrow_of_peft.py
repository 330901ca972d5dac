"""Our Arrow beside peft's, which takes experts of one rank on the same layers alone."""

import pytest
import torch
from peft import ArrowConfig, create_arrow_model

from mole_vl import Expert, Factors, mix, read_peft, write_peft
from mole_vl.gates import Arrow
from tests.nlp.toys import tiny_model

# peft asks transformers under a name that is going away.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
SHAPES = {"q_proj": (16, 16), "v_proj": (8, 16), "down_proj": (16, 32)}


def folders(root, names=("ann", "bob", "cyd", "dan"), rank=3):
    """Experts whose updates have one direction well ahead, which peft's 15 iterations find."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for name in names:
        layers = {}
        for block in range(2):
            for layer, (out, width) in SHAPES.items():
                part = "mlp" if layer == "down_proj" else "self_attn"
                a = torch.randn(rank, width, generator=generator)
                b = torch.randn(out, rank, generator=generator)
                b[:, 0] *= 10
                layers[f"model.layers.{block}.{part}.{layer}"] = Factors(a, b / 10, 2.0)
        write_peft(Expert(name, layers), root / name)
        found.append(root / name)
    return found


@pytest.mark.parametrize("top_k", [1, 3])
@torch.no_grad()
def test_prototypes_and_logits_are_those_of_peft(tmp_path, top_k):
    paths = folders(tmp_path)
    ids = torch.randint(1, 60, (2, 7), generator=torch.Generator().manual_seed(1))
    config = ArrowConfig(top_k=top_k, router_temperature=0.5)
    peer = create_arrow_model(tiny_model(), [str(path) for path in paths], config).eval()
    expected = peer(input_ids=ids).logits
    model = tiny_model()
    gate = Arrow(top_k=top_k, tau=0.5)
    mixture = mix(model, [read_peft(path) for path in paths], gate=gate, site="matrix")
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(tiny_model()(input_ids=ids).logits, expected, atol=1e-2)
    for path in mixture.layers:
        theirs = peer.get_submodule(f"base_model.model.{path}.lora_arrow.arrow_router").prototypes
        cosines = (mixture.gate(path).prototypes * theirs).sum(-1)
        torch.testing.assert_close(cosines.abs(), torch.ones(len(paths)), rtol=0, atol=1e-5)

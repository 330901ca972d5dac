"""Inference in the way of diffusers."""

from pipelines.composition import Composite as Composite, Switch as Switch
from pipelines.recipe import (
    Recipe as Recipe,
    read_recipe as read_recipe,
    save_picture as save_picture,
)
from pipelines.recording import Recording as Recording, WeightMap as WeightMap
from pipelines.routed_text import Routed as Routed, RoutedText as RoutedText
from pipelines.schedules import Step as Step
from pipelines.stable_diffusion import (
    MoLEStableDiffusionPipeline as MoLEStableDiffusionPipeline,
    MoLEStableDiffusionXLPipeline as MoLEStableDiffusionXLPipeline,
)
from pipelines.text_generation import MoLETextGeneration as MoLETextGeneration
from pipelines.token_weights import TokenWeights as TokenWeights

"""A mixture that learns in somebody else's loop: transformers' Trainer and those built on it."""

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor

from mole_vl.method import Method
from mole_vl.mixture import Mixture

T = TypeVar("T", bound=type)


def with_losses(trainer: T, mixture: Mixture, method: Method) -> T:
    """A trainer's class whose loss has the method's own terms too.

        Trainer = with_losses(Trainer, mixture, method)

    The rest is as ever: the mixed model is handed over as it is. The terms are divided by the
    micro-batches of a step where the trainer does not do so itself, and reach the training alone:
    what is evaluated is the plain loss.

    Args:
        trainer: transformers' Trainer, trl's SFTTrainer, or another class with their
            `compute_loss`.
        mixture: The mixture of the model in training.
        method: What made it.
    """

    class WithLosses(trainer):
        def compute_loss(
            self,
            model: Any,
            inputs: Mapping[str, Any],
            return_outputs: bool = False,
            num_items_in_batch: Any = None,
        ) -> Any:
            """As the trainer's own, with the terms added in training."""
            told = {"return_outputs": return_outputs, "num_items_in_batch": num_items_in_batch}
            if not model.training:
                return super().compute_loss(model, inputs, **told)
            with mixture.record() as records:
                found = super().compute_loss(model, inputs, **told)
            terms = method.losses(records, mixture.layout.blocks).values()
            extra: Tensor | float = sum((value * factor for value, factor in terms), 0.0)
            # A loss that was divided by the whole step's items is not divided again.
            if num_items_in_batch is not None and (
                self.model_accepts_loss_kwargs or self.compute_loss_func is not None
            ):
                extra = extra / self.current_gradient_accumulation_steps
            return (found[0] + extra, found[1]) if return_outputs else found + extra

    WithLosses.__name__ = WithLosses.__qualname__ = trainer.__name__
    return WithLosses  # pyright: ignore[reportReturnType] (a class made of a class)

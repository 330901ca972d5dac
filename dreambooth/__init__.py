"""Text-to-image: LoRA candidates, their mixtures, and the emoji world they are measured in."""

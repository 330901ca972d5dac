"""The emoji world: a small real text-to-image world whose compositions have a truth."""

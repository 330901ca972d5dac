"""The text world: four small tasks that get in each other's way."""

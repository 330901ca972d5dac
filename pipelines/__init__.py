"""Inference with mixtures."""

"""Multiple choice as ScienceQA asks it (arXiv 2209.09513), learned by MoLA (arXiv 2402.08562)."""

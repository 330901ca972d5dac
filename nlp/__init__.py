"""Language: data, loss, experts, evaluation, and a small world of text."""

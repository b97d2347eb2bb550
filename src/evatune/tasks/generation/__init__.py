"""Text generation: prompts and completions from files or a hub, and evaluation on held-out completions."""

"""What the paper looks at beside scores: similarity of components, distance that adapters travel, kernels."""

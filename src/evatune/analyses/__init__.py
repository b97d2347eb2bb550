"""What the paper looks at beside scores: similarity of components, movement of adapters, kernels, curvature."""

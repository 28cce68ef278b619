"""How a method moves tensors: which backend can run here, the reference, the kernels, Newton-Schulz."""

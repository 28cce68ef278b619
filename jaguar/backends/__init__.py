"""Backends move tensors as a method says: the reference, the kernels, Newton-Schulz, and the choice among them."""

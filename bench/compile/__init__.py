"""Kernels compiled without a GPU: Triton's and CUDA's, their registers, spills and memory. Uses no other room."""

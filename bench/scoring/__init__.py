"""Option scores: tokens, memory and time beside the benchmark's, and every architecture of transformers.

From elsewhere: `gpu` (tables), `step` (timing side by side).
"""

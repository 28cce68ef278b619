"""Theorems 1 and 2 of arXiv 2506.04430 on functions of which everything is known. Uses no other room."""

"""Losses that all methods reach on the same work with as many forward passes: the search of settings, and its table.

Uses no other room; `polar` uses `byte_model`.
"""

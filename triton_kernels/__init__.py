"""Triton kernels of jaguar; imports torch and triton only. `jaguar.backends.triton` feeds them.

coordinate, dense          the launches, named as their references in `jaguar.backends.reference`
rng, rounding, rules       what they compute with, named as its definitions in `jaguar`
memory, tables, launch     how values, tensors and numbers of a step reach a program
"""

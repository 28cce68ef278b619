"""Triton kernels of jaguar; imports torch and triton only. There are none yet: see `jaguar info`."""

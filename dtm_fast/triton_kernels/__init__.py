"""Triton kernels, one operation per file, imported by the operations when they are used: Triton may be missing."""

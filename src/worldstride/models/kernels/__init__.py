"""Kernels of models for a GPU. Their modules are imported when one is first launched, because they import triton."""

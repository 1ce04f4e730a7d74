"""Fused operators: each has a plain-torch reference that specifies it. Imports torch and triton, never mirai_dist."""

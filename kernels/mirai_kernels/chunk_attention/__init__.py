"""Attention of one segment to the cached keys of earlier segments and its own."""

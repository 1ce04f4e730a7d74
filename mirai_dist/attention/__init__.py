"""Attention: patterns over segments, and the backends that compute their dense parts."""

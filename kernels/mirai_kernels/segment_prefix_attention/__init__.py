"""Attention in which a segment sees prefixes of segments: block-causal and teacher-forced training."""

"""Gate and residual of one sub-layer, and LayerNorm and modulation of the next, in one pass over the tokens."""

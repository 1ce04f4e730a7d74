"""Multi-node training of causal few-step video generators by distribution matching with foresight."""

__version__ = "0.1.0"

"""Certificates: kernels and backends against float64 at the shapes of a recipe, on the machine that will run it."""

"""Sharding of networks it is handed: mesh, units, recomputation, materialisation, the FSDP2 engine."""

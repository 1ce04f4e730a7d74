"""Networks as plain `nn.Module`s: no process group, no recipe object, no sharding."""

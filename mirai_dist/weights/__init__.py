"""Published weight files in and out: official and diffusers folders, `.pt` files of the causal releases."""

"""The cycle: one generator update and its critic updates, with what they need and what surrounds them."""

"""What a run will cost and how it is laid out, as plain data. No torch: login nodes import this."""

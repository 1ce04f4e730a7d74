"""Process start, signals and hard exits of one rank."""

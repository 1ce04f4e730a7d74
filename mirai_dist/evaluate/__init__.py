"""What is measured of a trained generator, and the report."""

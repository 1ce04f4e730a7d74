"""The test-suite; see README.md beside this file for its layers."""

"""What a run tells its user: phase times, metrics, sinks and the one place that prints."""

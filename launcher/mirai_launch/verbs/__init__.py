"""One file a verb: `configure(parser)` and `run(arguments) -> exit code`."""

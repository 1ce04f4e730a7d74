"""SLURM: text to submit (render), what it answers (parse), and the one file that calls its commands (client)."""

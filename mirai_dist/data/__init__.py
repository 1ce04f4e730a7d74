"""What the stages train on: the procedural video world and its prompts."""

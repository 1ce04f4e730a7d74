"""What `mirai VERB` runs where torch is needed: one file a verb, started as `python -m mirai_dist.commands.VERB`."""

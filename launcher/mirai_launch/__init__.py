"""The `mirai` command. Runs on login nodes: never imports torch."""

from mirai_dist import __version__

__all__ = ["__version__"]

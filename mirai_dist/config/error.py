"""The exceptions that input can cause: a recipe, and a file that it or the command line names."""

from __future__ import annotations


class RecipeError(ValueError):
    """A recipe, an override or a run directory that cannot be used; `str` is one line: where, what, what to do.

    Programs that end with it exit with `exit_code` (do not requeue) and show no traceback.
    """

    exit_code = 20

    def __init__(self, where: str, what: str) -> None:
        self.where = where
        self.what = what
        super().__init__(" ".join(f"{where}: {what}".split()))


class FileError(RuntimeError):
    """A file or folder that cannot be used: weights, prompts, embeddings, an encoder or VAE folder, a video.

    `str` is one line: where, what, what to do. Programs that end with it show no traceback.
    """

    exit_code = 20

    def __init__(self, where: object, what: str) -> None:
        self.where = str(where)
        self.what = what
        super().__init__(" ".join(f"{where}: {what}".split()))

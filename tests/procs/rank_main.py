"""One rank of a `torchrun` test: python rank_main.py TEST_FILE FUNCTION FOLDER (see tests/procs/conftest.py)."""

from __future__ import annotations

import importlib.util
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist


def main(test_file: str, function: str, folder: str) -> None:
    """Call FUNCTION(FOLDER) with a gloo group of all ranks; on an exception leave a record and exit at once."""
    rank = int(os.environ["RANK"])
    try:
        dist.init_process_group("gloo")
        spec = importlib.util.spec_from_file_location(Path(test_file).stem, test_file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        getattr(module, function)(Path(folder))
        dist.barrier()
    except BaseException as error:  # noqa: BLE001
        text = "".join(traceback.format_exception(error))
        Path(folder, f"error-{time.time_ns():020d}-rank-{rank}").write_text(text)
        os._exit(1)  # the other ranks may be waiting in a collective for us: no tidying up
    dist.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])

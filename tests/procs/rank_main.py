"""One rank of a `torchrun` test (see conftest.py): python rank_main.py TEST_FILE FUNCTION FOLDER SECONDS."""

from __future__ import annotations

import faulthandler
import importlib.util
import os
import sys
import time
import traceback
from pathlib import Path

import torch.distributed as dist


def main(test_file: str, function: str, folder: str) -> None:
    """Call FUNCTION(FOLDER) with a gloo group of all ranks; on an exception leave a record and exit at once."""
    rank = os.environ["RANK"]
    try:
        dist.init_process_group("gloo")
        spec = importlib.util.spec_from_file_location(Path(test_file).stem, test_file)
        assert spec and spec.loader
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        getattr(module, function)(Path(folder))
        dist.barrier()
    except BaseException as error:
        text = "".join(traceback.format_exception(error))
        Path(folder, f"error-{time.time_ns():020d}-rank-{rank}").write_text(text)
        os._exit(1)  # the other ranks may be waiting in a collective for us: no tidying up
    dist.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as mirai_dist/__main__.py ends: gloo's threads may abort in the interpreter's shutdown


if __name__ == "__main__":
    # torchrun gives each rank a session of its own, out of reach of whoever gives up waiting: it ends itself.
    with open(Path(sys.argv[3], f"hang-rank-{os.environ['RANK']}"), "w") as record:
        faulthandler.dump_traceback_later(float(sys.argv[4]), exit=True, file=record)
        main(*sys.argv[1:4])
        faulthandler.cancel_dump_traceback_later()

"""A rank of tests/test_trainer_joining.py: joins, and fails the first time; then shows torchrun's store."""

import os
import sys
import time
from datetime import timedelta

from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from trainer.engine import start_world

rank, is_first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
if not is_first and rank == 1:
    time.sleep(1)  # so the other one could find the address that this one had before
world = start_world(timedelta(seconds=60))
assert world.gather(rank) == [0, 1]
if rank == 0 and not is_first:
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    print(*TCPStore(*place, is_master=False).list_keys(), sep="\n")
sys.exit(int(is_first))

"""What survives a run: committed checkpoints, keyed randomness, stream cursors, weight averages.

    commit.py       a directory that exists whole or not at all; which checkpoint is the newest (no torch)
    checkpoint.py   networks, moments, averages, extras and cached samples in such a directory, for any world size
    draws.py        random numbers as a pure function of (seed, purpose, cycle, position, sample)
    cursor.py       sample order as a pure function of (seed, stream, global sample number)
    ema.py          fp32 moving average of the weights on each rank's shard

Nothing is imported here, so that a process without torch can read `commit`.
"""

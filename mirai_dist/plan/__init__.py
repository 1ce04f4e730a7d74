"""What a run will cost and how it is laid out, as plain data. No torch: login nodes import this.

    shards      what FSDP gathers at a time: the plan that the run itself applies
    shapes      every parameter           passes      every network call of an update
    flops, traffic, memory, time          what follows from those
    estimate    all of it for a run       verdict     does it fit, and what would make it
"""

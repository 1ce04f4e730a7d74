"""A run as its operator sees it, from its directory alone: what happened, what is asked of it, where it stands.

    events.py    events.jsonl: starts, saves, stops, failures, answers
    control.py   requests to a running job, one file each
    status.py    the state of a run, derived from what it has written
    stacks.py    where its ranks stand, from their stack dumps

No torch here: login nodes read and write all of this.
"""

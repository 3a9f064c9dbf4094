"""`entropy-probe watch`: each new complete checkpoint of a run is measured once, beside the training.

complete   whether a checkpoint's folder is whole, by what its files say of themselves
state      what is known of a run: one JSON line a checkpoint, locked by one watcher
measuring  one measurement: pytest in a process of its own, on hard links to the checkpoint
child      that process, which ends when the watcher does
watcher    the loop, and what is kept of a measurement
screen     what is seen: a live page on a terminal, a line an event without one
webhook    the verdict, posted as JSON
"""

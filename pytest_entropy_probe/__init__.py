"""The pytest side of the entropy probe: pytest in, library out.

plugin.py    options, ini keys, markers; wakes the rest when a checkpoint is given
settings.py  what was asked for: options and ini keys, resolved to paths and names
collect.py   brings the shipped checks into the run, with stable ids
fixtures.py  loads and measures, once per checkpoint
golden.py    compares with golden files, writes them when asked to
judge.py     how a verdict ends a test
processes.py several processes under torchrun
progress.py  the progress bar on stderr
summary.py   header, terminal table, report.json, hand-over from xdist workers
"""

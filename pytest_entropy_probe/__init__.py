"""The pytest side of the entropy probe: pytest in, library out.

In every run of pytest:
plugin.py     options, ini keys, markers; wakes the rest when a checkpoint is given
names.py      the names of options, ini keys, markers and fixtures, with their help
fixtures.py   fixtures for tests of the user's own, which skip without a checkpoint
rootdir.py    a value that pytest took for the place of the tests

What was asked for:
values.py     one option or ini key: a path, a number, a choice
targets.py    checkpoints with their names
settings.py   all of it together
markers.py    names in -m that no marker has

One checkpoint:
subject.py    loaded and measured once in a process; its configuration
library.py    the calls into entropy_probe
kept.py       its report in pytest's cache
progress.py   the progress bar on stderr
ranks.py      other processes under torchrun, as rank 0 sees them;  follower.py  one of the others

What comes of it:
collection/   the shipped checks as tests of the run
checks.py     their fixtures;  speed.py  that of the benchmarks
judge.py      how a verdict ends a test
golden.py     comparison with golden files, and writing them;  golden_files.py  which a run used
shown/        header, tables, report.json, figures, the page beside a job
"""

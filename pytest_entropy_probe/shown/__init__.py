"""What a run shows.

summary   header, tables, report.json, figures;   tables  rows of criteria, checkpoints by step
records   what a test says of its checkpoint, as properties of its report
verdict   the answer in one sentence;   skills  predictors against a run
markdown  the page beside a job;   explain  `--probe-explain`;   terminal  tables in its characters
"""

"""What a run shows.

summary   header, tables, report.json, figures;   tables  rows of criteria, checkpoints by step
records   what a test says of its checkpoint, as properties of its report
screen    the first screen: the answer, and what did not pass
skills    predictors against a run;   page  one HTML file of the run
markdown  the page beside a job;   explain  `--probe-explain`;   terminal  tables in its characters
"""

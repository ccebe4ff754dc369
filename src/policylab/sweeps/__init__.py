"""Sweeps: the jobs of a multirun as processes of this machine, the record of a sweep, and going on with it.

jobs.py      what a job is: its words, its label, its folder
choices.py   values by choice: ``optim.lr={ppo:7e-4,rloo:3e-4}``
index.py     ``sweep.jsonl``: what a sweep is, and its jobs
process.py   one job as a process
slots.py     how many jobs run at once, on which cores and GPUs
pool.py      runs jobs as long as there are any
progress.py  how far a job is
table.py     what the console shows
ending.py    results, failures and the next commands
sweep.py     all of it, for Hydra's launcher
"""

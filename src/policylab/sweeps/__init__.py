"""Sweeps: runs the jobs of a multirun as processes of this machine, records the sweep, and resumes it.

jobs.py      a job: its overrides, its label, its folder
choices.py   values by choice: ``optim.lr={ppo:7e-4,rloo:3e-4}``
index.py     ``sweep.jsonl``: the record of a sweep and its jobs
process.py   one job as a process
cluster.py   one job as a SLURM job
slots.py     how many jobs run at once, on which cores and GPUs
pool.py      runs all jobs, several at once
progress.py  the progress of a job
table.py     the console's table and lines
ending.py    results, failures and the next commands
sweep.py     the whole sweep, for Hydra's launcher
"""

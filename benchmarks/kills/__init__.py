"""What `benchmarks/chaos.py` is made of: small runs, ways to kill them, and a close look at what they left.

settings.py   the runs
attempt.py    one start of train.py, watched from outside
kinds.py      how a run is killed, or its disk filled
victim.py     a run that is killed and started again until it is done
records.py    what a run left, and how two runs differ
"""

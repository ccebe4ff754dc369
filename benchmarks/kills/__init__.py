"""The parts of `benchmarks/chaos.py`: small runs, ways to kill them, and a comparison of their files.

settings.py   the runs
attempt.py    one start of train.py, observed from outside
kinds.py      how a run is killed, or its disk filled
victim.py     a run that is killed and restarted until it is done
records.py    the files of a run, and the differences between two runs
"""

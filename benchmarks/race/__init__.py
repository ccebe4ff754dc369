"""The race of `benchmarks/vs_trl.py`: one iteration of ours against one of TRL's, in turn, on the same work.

work.py       what both sides do, as plain data
weights.py    the model that both load
ours.py       our side: the composed config, built and trained as ever
theirs.py     TRL's side, in whatever environment has TRL
lane.py       the end of a worker's line to the referee, and its stopwatch
referee.py    starts the two workers and lets them run in turn
agreement.py  whether both made the same update
figures.py    medians, ratio, tables

`benchmarks/to_reward.py` lets them run in turn as well: recipe.py says what both do, ours_to_reward.py and
theirs_to_reward.py are the sides.
"""

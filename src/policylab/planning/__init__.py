"""Plan before you pay: what a run takes in memory, work and time, said before a weight is loaded."""

"""Plans: memory, compute and time of a run, estimated before any weights are loaded."""

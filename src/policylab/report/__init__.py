"""Evidence from finished runs: curves, tables and statistics over seeds."""

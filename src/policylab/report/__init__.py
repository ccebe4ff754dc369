"""Results of finished runs: curves, tables and statistics over seeds."""

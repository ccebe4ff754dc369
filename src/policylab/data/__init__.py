"""The data of an iteration, and how it is cut."""

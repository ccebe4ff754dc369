"""What flows through an iteration, and how it is cut."""

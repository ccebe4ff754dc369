"""Processes: who they are, how they talk, how a model is shared among them."""

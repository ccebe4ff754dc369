"""Processes: ranks, communication, and sharding of a model."""

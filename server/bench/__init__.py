"""Scores checkpoints on downstream tasks."""

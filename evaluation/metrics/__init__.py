"""Metrics on texts and judge tokens. Each knows its inputs only: no tasks, no systems, no files."""

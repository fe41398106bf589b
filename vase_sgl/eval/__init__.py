"""Measuring what eviction costs: tasks, graders, detectors of bad output, statistics."""

"""Evaluation: what a budget costs, measured."""

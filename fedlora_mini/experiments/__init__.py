"""Runs, comparisons, evidence."""

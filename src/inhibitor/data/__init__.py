"""Labelled tasks, unlabelled text, and their strict readers."""

"""Figures, tables and pages of jobs."""

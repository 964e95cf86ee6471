"""Decisions only: where tasks go, how many executors there are. No I/O, no clock, no global random numbers."""

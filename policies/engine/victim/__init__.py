"""Preemption victims: who gives its blocks up when none are left."""

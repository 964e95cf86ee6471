"""How many executors a TE group has."""

"""Which executor a task goes to."""

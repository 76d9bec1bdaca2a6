"""The parts of a report that a task adds."""

"""The campaign of faults behind docs/reliability.md: `make faults`; one part of it: `PYTHONPATH=tests python -m faults PART`."""

"""What launch/gpu_check.py runs: its checks, and the packages that a machine without a network needs for them."""

"""One benchmark a file: add_arguments(parser), and main(args), which gives its figures. `launch/bench.py NAME` runs one."""

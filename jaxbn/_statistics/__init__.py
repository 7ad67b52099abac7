"""What is done with statistics outside of a norm: measured over data, compared, folded into a kernel."""

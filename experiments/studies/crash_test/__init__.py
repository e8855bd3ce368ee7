"""Training survives SIGKILL at any moment: the weights and logs stay bit-identical."""

"""Benchmarks: time and memory of operators, mixers and UNets, against other implementations and hardware limits."""

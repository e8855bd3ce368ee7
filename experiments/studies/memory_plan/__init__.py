"""The memory estimate of a plan against the measured peak."""

"""The largest image one machine can make, and how fast."""

"""Large images from the command line, and what they cost."""

"""Large images from the command line, and measurements of what they cost."""

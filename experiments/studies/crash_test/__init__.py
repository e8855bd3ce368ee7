"""Does a training that is killed at any moment resume bit-identically?"""

"""One folder per study: experiments that answer one question and are run by hand, each with one entry point."""

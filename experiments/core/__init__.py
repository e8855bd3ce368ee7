"""The ground floor of the experiments: what every other room may import and that imports none of them."""

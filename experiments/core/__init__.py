"""The ground floor of the experiments: files, locks, progress, devices, errors, registries. Imports no other room."""

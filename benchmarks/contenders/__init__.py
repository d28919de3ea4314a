"""Frameworks that train the same workloads, a process each."""

"""Benchmarks of hvd_compress; importable so that tests can use the virtual cluster."""

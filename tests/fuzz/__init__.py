"""Fuzzing of everything that reads bytes from other ranks or from files."""

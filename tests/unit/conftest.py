"""One hypothesis profile for all: the same examples on every run, and no time limit, as the machine may be busy."""

from hypothesis import settings

settings.register_profile("hvd_compress", derandomize=True, deadline=None, max_examples=60, database=None)
settings.load_profile("hvd_compress")

"""The hypothesis profile of the unit tests, also where this folder is run alone."""

import tests.unit.conftest  # noqa: F401 - it loads the profile

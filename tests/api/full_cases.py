"""Cases for keys, sizes, a mesh that is full, deadlines, and clients that leave: as those of :mod:`tests.api.cases`."""

from tests.api.other_cases import parameters as parameters

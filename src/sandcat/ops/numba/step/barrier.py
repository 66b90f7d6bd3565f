"""Where all threads of a step wait for each other."""

from numba import types

barrier = types.ExternalFunction("GOMP_barrier", types.void())

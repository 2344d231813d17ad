"""Which worker is best, and why: pure functions of the request, the workers, the index and the load."""

"""`meshserve demo`: a whole disaggregated mesh on this machine, and what happens to a prompt in it."""

"""`meshserve top`: what every peer is doing, live."""

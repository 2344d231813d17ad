"""`meshserve trace`: who served a request, why, and where its time went."""

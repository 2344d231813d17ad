"""What options may say. Every command of meshserve imports this, so it imports nothing."""

FORMS = "N | uniform:LOW:HIGH | normal:MEAN:DEVIATION | lognormal:MEDIAN:SIGMA"
ARRIVALS = ("poisson", "constant")
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}

"""`python -m demo`: the norms of real models, compared bit by bit."""

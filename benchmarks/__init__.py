"""Evidence for the project's claims: one folder a benchmark, and a table of all of them."""

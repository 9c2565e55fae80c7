"""`python -m demo`: a question over a large log, answered from inside a real container."""

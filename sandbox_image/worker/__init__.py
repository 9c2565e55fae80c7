"""The guest: a worker that talks to the orchestrator, and the interpreter it supervises.

  orchestrator <- gRPC over a Unix socket -> worker (PID 1) <- frames -> interpreter (runs cells)

The two are separate processes so that a cell which hangs, forks, fills its memory or kills itself leaves the
worker able to say so.
"""

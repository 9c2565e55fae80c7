"""What goes into a sandbox: the worker, and how its image is made. Nothing here is imported by the orchestrator."""

"""What runs inside a sandbox. It shares nothing with the orchestrator but the protos."""

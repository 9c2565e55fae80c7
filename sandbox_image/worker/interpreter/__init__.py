"""The process that runs cells. Standard library only: what is imported here, every cell pays for."""

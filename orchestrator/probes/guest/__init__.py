"""What runs inside the sandbox that is probed: one file a probe, each printing one line of JSON.

They are sent as cells, so they know Python's standard library and `door`, which is sent first under its own
name. They are bounded in loops, bytes and seconds, and stop at the first sign that a door is open.
"""

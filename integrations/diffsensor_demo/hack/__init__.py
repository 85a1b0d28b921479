"""A reward that can be hacked, in a real GRPO run: `python -m diffsensor_demo.hack`."""

"""Files that survive a kill and show when they were changed."""

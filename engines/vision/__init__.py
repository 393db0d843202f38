"""Models that look at a picture and write."""

"""The console: a page for people at /console, its files, and the feed that keeps it up to date."""

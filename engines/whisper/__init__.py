"""Speech recognition, by Whisper's networks."""

"""What every model that writes text shares: its checkpoint, its tokens, the rows of a batch, the words so far."""

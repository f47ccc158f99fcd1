"""From files of text to batches of packed tokens, resumable to the token. The only room that
knows grain."""

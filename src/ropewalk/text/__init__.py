"""Text in and out: tokenizers and chat templates. Knows no model and no array but token ids."""

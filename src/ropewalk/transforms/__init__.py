"""What acts on a built model before any optimizer exists: for now, its layout."""

"""What a run measures of itself, where the numbers go, and the page that shows them."""

"""What a bundle's results are worth: one file a bundle, and what they share."""

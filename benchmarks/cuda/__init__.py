"""What this package does on a GPU, beside what one would do with torch and transformers alone."""

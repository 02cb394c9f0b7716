"""What the book's cells draw with: one style, token strips, figures with sliders."""

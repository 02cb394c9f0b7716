"""The attack on bidirectional models: tables, seeds, relaxation, polish, and confirmation row by row (chapter 5)."""

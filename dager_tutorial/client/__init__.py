"""A client's day: a private batch and a loss become an update (chapter 1). Only `evaluation` may see what it knows."""

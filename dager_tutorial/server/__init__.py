"""The attack: an update and a model in, a reconstruction out. Nothing here ever sees a batch."""

"""The search where an adapter is too narrow for a span: a text that explains all of its directions.

Chapter `11_limits`.
"""

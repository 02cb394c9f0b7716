"""The attack on bidirectional models: tables, seeds, relaxation, polish, and confirmation row by row.

Chapter `08_encoder_recovery`.
"""

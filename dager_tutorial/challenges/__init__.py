"""Sealed envelopes: updates to attack whose texts nobody is told, and grades by hashes (chapter `16_sealed_envelopes`).

`registry` says which there are, `grading` what a submission is worth; `build` and `answers` are the instructor's.
"""

"""Checks of the book's exercises: one file for each chapter, one function for each exercise.

A check takes the reader's own function, tries it, and raises AssertionError with a hint where it is wrong.
"""

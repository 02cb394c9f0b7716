"""The audit's report: plain facts, and one page that shows them to people who do not run notebooks."""

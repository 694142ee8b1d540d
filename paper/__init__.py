"""The paper: its numbers and claims as data; our evaluations, tables, plots and checks."""

"""The paper: its numbers and claims as data; our cells, tables, plots, experiments beside them."""

"""``hpcpar doctor``: facts are gathered, then judged by a table of small checks, then explained."""

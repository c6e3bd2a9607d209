"""One model and what can be changed in it: sites, anatomy, hooks, edits, rankings, steerings."""

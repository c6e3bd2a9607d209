"""Everything that touches lmms-eval: tasks, recorded inputs, gold answers, kinds of answers."""

"""What every policy stands on: the contract, budgets, slots, policies by layer and as they are written."""

"""How tokens are stored: in few bits, in few dimensions, shared, or in the CPU's memory."""

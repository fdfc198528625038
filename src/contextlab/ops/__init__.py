"""The mathematics: pure functions on tensors in the layout [batch, time, heads, dim]."""

"""What is read: policies that keep every token and read a few of them for each decoded token."""

"""What `gn-fast` can do: a module for each command, what a terminal shows in `terminal`, files in `npy`."""

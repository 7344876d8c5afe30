"""The op on sequences that a mesh axis splits: what each device needs of the others."""

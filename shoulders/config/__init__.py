"""The recipe of a run: its sections, how it is read and checked, and the messages about faults in it."""

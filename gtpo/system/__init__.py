"""The machine around a run: environment, processes, signals, terminal and files."""

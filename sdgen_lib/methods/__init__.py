"""One file a method: its `Conditioner`, its steps, and its `work.Source`s."""

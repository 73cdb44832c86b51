"""Running modules: forward passes, hooks, linear maps, and several processes."""

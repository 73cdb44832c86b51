"""Commands, one file each; they import what they need when they run."""

"""Pictures of a timeline: svg and png, and lines for a terminal."""

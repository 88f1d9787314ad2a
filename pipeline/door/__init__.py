"""The door: a checkpoint's own words are honoured by what ships, or refused before anything expensive."""

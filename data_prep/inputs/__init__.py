"""Tables, folders and tars, local or remote, become rows."""
